"""Fixtures of the kernel tier: fresh network namespaces on this machine's kernel; needs root."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from support.namespaces import Namespace, create, namespaces


@pytest.fixture
def netns() -> Iterator[Namespace]:
    """One fresh namespace with loopback up."""
    with namespaces() as (namespace,):
        yield namespace


@pytest.fixture
def new_netns() -> Iterator[Callable[[], Namespace]]:
    """A maker of as many fresh namespaces as a test needs."""
    made: list[Namespace] = []

    def make() -> Namespace:
        made.append(create())
        return made[-1]

    try:
        yield make
    finally:
        for namespace in made:
            namespace.delete()
