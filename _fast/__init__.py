"""What is hot: Cython modules, each beside a plain-Python twin that serves the tests as an oracle.

There is no fall-back. Whoever needs one of them needs all, so that a missing extension is an ImportError at start,
never a silently slow agent nor a surprise on a rare path. All together cost 0.2 MB.
"""

from kube_router._fast import ipset, rulehash, tunnelname

__all__ = ["ipset", "rulehash", "tunnelname"]
