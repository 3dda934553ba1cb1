"""What is hot: Cython modules, each beside a plain-Python twin that serves the tests as an oracle.

There is no fall-back: a missing extension is an ImportError at start, never a silently slow agent.
"""
