"""What the documentation tells to type is taken by the programs, and its translations say the same."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from dsiprep.cli.app import build_parser
from dsiprep.cli.tools import build_parser as build_tools

DOCS = Path(__file__).parents[1] / "docs"
ENGLISH, CHINESE = DOCS / "dsi-in-practice.md", DOCS / "dsi-in-practice.zh.md"


def typed(page: Path) -> list[str]:
    """The lines of its shell blocks, comments taken off."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [bare for line in lines if (bare := re.sub(r"(^|\s+)#.*", "", line).strip())]


@pytest.mark.parametrize("page", [ENGLISH, CHINESE], ids=["en", "zh"])
def test_commands_are_taken(page: Path) -> None:
    parsers = {"dsiprep": build_parser(), "dsiprep-tools": build_tools()}
    found = [words for line in typed(page) if (words := shlex.split(line.split(">")[0]))[0] in parsers]
    assert len(found) >= 5
    for program, *arguments in found:
        assert parsers[program].parse_args(arguments), arguments


def test_both_languages_say_the_same() -> None:
    english, chinese = (page.read_text(encoding="utf-8") for page in (ENGLISH, CHINESE))
    assert typed(ENGLISH) == typed(CHINESE)
    for pattern in (r"--[a-z][\w-]+", r"\d+\.\d\d+", r"https?://[^)\s]+", r"^\|", r"^#+ ", r"`[\w-]+\.\w+`"):
        one, other = (re.findall(pattern, text, re.MULTILINE) for text in (english, chinese))
        assert sorted(one) == sorted(other), pattern
