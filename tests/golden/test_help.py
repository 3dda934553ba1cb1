"""The help text, word for word, and its copy in the documentation."""

from __future__ import annotations

from pathlib import Path

from kube_router.supervisor.flags import help_text

HELP = Path(__file__).with_name("help.txt")
PAGE = Path(__file__).parents[2] / "docs" / "flags.md"


def test_help_is_the_golden_text() -> None:
    assert help_text() == HELP.read_text(), (
        "meant? then: python -P -m kube_router.supervisor.cli -h 2>tests/golden/help.txt"
    )


def test_the_documentation_holds_the_help() -> None:
    _, _, after = PAGE.read_text().partition("<!-- generated: ")
    block, end, _ = after.partition("<!-- end of generated -->")
    assert end
    assert block.split("```\n")[1] == help_text()
