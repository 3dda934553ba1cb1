"""The search for what the kernel refuses: it names exactly that, in few tries, and stops somewhere."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from kube_router.workers.firewall.chainsync import MOST_PROBES, search
from kube_router.workers.kernel.iptables import IptablesError, Refused


class Kernel:
    """Takes some items or none of them; refuses a batch with a bad one."""

    def __init__(self, bad: set[str]) -> None:
        self.bad, self.taken, self.tries = bad, set[str](), 0

    def attempt(self, some: Sequence[str]) -> IptablesError | None:
        self.tries += 1
        if self.bad & set(some):
            return Refused(f"line {self.tries}: {min(self.bad & set(some))}")
        self.taken |= set(some)
        return None


@given(st.integers(0, 300), st.sets(st.integers(0, 299), max_size=3))
def test_the_bad_ones_are_found_and_all_others_are_done(count: int, bad: set[int]) -> None:
    items = [f"c{number}" for number in range(count)]
    kernel = Kernel({f"c{number}" for number in bad if number < count})
    refused = search(items, kernel.attempt)
    assert refused.keys() == kernel.bad
    assert kernel.taken == set(items) - kernel.bad
    assert all(name in str(error) for name, error in refused.items())
    assert kernel.tries <= 1 + 2 * 9 * len(kernel.bad)


def test_when_everything_is_bad_the_search_ends_and_nothing_counts_as_done() -> None:
    items = [f"c{number}" for number in range(5000)]
    kernel = Kernel(set(items))
    assert search(items, kernel.attempt).keys() == set(items)
    assert kernel.tries == MOST_PROBES


def test_an_error_that_no_other_input_would_mend_ends_the_search_of_that_part() -> None:
    def locked(some: Sequence[str]) -> IptablesError | None:
        return IptablesError("another program holds the xtables lock")

    refused = search(["a", "b", "c"], locked)
    assert refused.keys() == {"a", "b", "c"}
    assert search([], locked) == {}
