"""nftables tables as a whole, on the real kernel: found by family and name, deleted with all that is in them."""

from __future__ import annotations

import pytest
from support.namespaces import Namespace

from kube_router.workers.kernel.nfttables import delete_table, has_table
from kube_router.workers.model import Family


@pytest.mark.parametrize(("family", "word"), [(Family.IPV4, "ip"), (Family.IPV6, "ip6")], ids=str)
def test_a_table_is_deleted_with_its_contents_and_only_that_one(netns: Namespace, family: Family, word: str) -> None:
    other = "ip6" if word == "ip" else "ip"
    netns.run(f"nft add table {other} mine; nft add table {word} another")
    before = netns.run("nft list ruleset")
    with netns.enter():
        assert not has_table(family, "mine")
        assert delete_table(family, "mine") is False
        netns.run(f"nft add table {word} mine; nft add chain {word} mine c; nft add rule {word} mine c counter")
        assert has_table(family, "mine")
        assert delete_table(family, "mine") is True
        assert not has_table(family, "mine")
    assert netns.run("nft list ruleset") == before
