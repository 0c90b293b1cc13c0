"""Commands, Python examples, links and paths in the documentation work, and translations match the English pages."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import runpy
import shlex
from pathlib import Path

import pytest

import dsiprep
from dsiprep.cli.app import build_parser
from dsiprep.cli.tools import build_parser as build_tools
from dsiprep.ops.qspace.sampling_scheme import recognise
from dsiprep.phantom.schemes import gradient_table
from dsiprep.qsiprep.dataset_cases import Case
from dsiprep.qsiprep.option_choices import UserOptions, choose_options
from dsiprep.qsiprep.releases import Release

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GENERATED = DOCS / "options.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md"))]
TRANSLATIONS = [
    (ROOT / "README.md", DOCS / "README.zh.md"),
    (DOCS / "getting-started.md", DOCS / "getting-started.zh.md"),
    (DOCS / "dsi-in-practice.md", DOCS / "dsi-in-practice.zh.md"),
]
SOURCE_FOLDERS = "benchmarks|tests|docs|src|cli|engines|io|ops|phantom|stages|api"
NUMBER = r"(?<![A-Za-z0-9_=.-])\d+(?:[.,]\d+)*(?![A-Za-z0-9_])"  # not those in names such as T1w or b=0

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
every_translation = pytest.mark.parametrize(
    ("english", "chinese"), TRANSLATIONS, ids=[english.stem for english, _ in TRANSLATIONS]
)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose(page: Path) -> str:
    """Return the text of a page without its fenced code blocks."""
    return re.sub(r"^```.*?^```$", "", read(page), flags=re.DOTALL | re.MULTILINE)


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", read(page), re.DOTALL | re.MULTILINE)


def shell_commands(page: Path) -> list[str]:
    """Return the commands of the bash blocks, without comments and with continued lines joined."""
    lines = [line for block in code_blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [command for line in lines if (command := re.sub(r"(^|\s+)#.*", "", line).strip())]


def heading_levels(page: Path) -> list[int]:
    return [len(marks) for marks in re.findall(r"^(#+) ", prose(page), re.MULTILINE)]


def heading_anchors(page: Path) -> list[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return [re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles]


def links(page: Path) -> list[str]:
    return re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(page))


def link_target(page: Path, link: str) -> tuple[Path, str]:
    """Return the file and the anchor of a relative link."""
    path, _, anchor = link.partition("#")
    return (page.parent / path).resolve() if path else page, anchor


def comparable_links(page: Path, translation: Path) -> list[str]:
    """Return web addresses, and relative links as language-independent file and heading number."""
    found = []
    for link in links(page):
        if link.startswith("http"):
            found.append(link)
            continue
        path, anchor = link_target(page, link)
        if path != translation:
            heading = heading_anchors(path).index(anchor) if anchor else ""
            found.append(f"{path.name.replace('.zh.md', '.md')}#{heading}")
    return sorted(found)


def check_calls(tree: ast.Module, imported: dict[str, object]) -> None:
    """Check that calls of imported functions and classes match their signatures."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and callable(imported.get(node.func.id)):
            keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg}
            inspect.signature(imported[node.func.id]).bind(*node.args, **keywords)


@every_page
def test_commands_parse(page: Path) -> None:
    parsers = {"dsiprep": build_parser(), "dsiprep-tools": build_tools()}
    makefile = (ROOT / "Makefile").read_text()
    for line in shell_commands(page):
        program, *arguments = shlex.split(line.split(">")[0]) if line.startswith("dsiprep") else line.split()
        if program in parsers:
            assert parsers[program].parse_args(arguments), line
        if program == "make":
            assert re.search(rf"^{arguments[0]}:", makefile, re.MULTILINE), line


@pytest.mark.parametrize("page", [page for page in PAGES if page != GENERATED], ids=lambda page: page.name)
def test_commands_are_in_fenced_blocks(page: Path) -> None:
    assert not re.findall(r"^ {4,}(?:dsiprep|dsiprep-tools|pip|make|git|import|from) .*", prose(page), re.MULTILINE)


def test_main_pages_contain_commands() -> None:
    for page in {page for pair in TRANSLATIONS for page in pair} | {DOCS / "warps.md", DOCS / "engines.md"}:
        assert any(command.startswith("dsiprep") for command in shell_commands(page)), page.name


@every_page
def test_python_examples_match_the_package(page: Path) -> None:
    for block in code_blocks(page, "python"):
        tree = ast.parse(block)
        imported = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "dsiprep":
                module = importlib.import_module(node.module)
                imported |= {alias.name: getattr(module, alias.name) for alias in node.names}
        check_calls(tree, imported)


@every_page
def test_relative_links_lead_to_files_and_headings(page: Path) -> None:
    for link in links(page):
        if not link.startswith("http"):
            path, anchor = link_target(page, link)
            assert path.is_file(), link
            assert not anchor or anchor in heading_anchors(path), link


@every_page
def test_source_paths_exist(page: Path) -> None:
    for path in re.findall(rf"`(?:python )?((?:{SOURCE_FOLDERS})/[\w/.-]+\.(?:py|md))\b", read(page)):
        assert any((folder / path).is_file() for folder in (ROOT, ROOT / "src" / "dsiprep")), path


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_page_starts_with_title_and_summary(page: Path) -> None:
    first, *paragraphs = (part for part in read(page).split("\n\n") if not re.match(r"\[(中文|English)\]", part))
    assert re.fullmatch(r"# .+", first.strip())
    assert heading_levels(page).count(1) == 1
    assert re.match(r"[^#|`\s]|`\w", paragraphs[0]), paragraphs[0]


@every_translation
def test_translation_has_the_same_code(english: Path, chinese: Path) -> None:
    assert shell_commands(english) == shell_commands(chinese)
    for one, other in zip(code_blocks(english, "python"), code_blocks(chinese, "python"), strict=True):
        assert ast.dump(ast.parse(one)) == ast.dump(ast.parse(other))


@every_translation
@pytest.mark.parametrize(
    "pattern",
    [r"--[a-z][\w-]+", NUMBER, r"^\|", r"(?<!`)`[^`\n]+`(?!`)"],
    ids=["options", "numbers", "table rows", "inline code"],
)
def test_translation_has_the_same_facts(english: Path, chinese: Path, pattern: str) -> None:
    one, other = (sorted(re.findall(pattern, prose(page), re.MULTILINE)) for page in (english, chinese))
    assert one == other


@every_translation
def test_translation_has_the_same_headings_and_links(english: Path, chinese: Path) -> None:
    assert heading_levels(english) == heading_levels(chinese)
    assert comparable_links(english, chinese) == comparable_links(chinese, english)


@every_translation
def test_translations_link_to_each_other(english: Path, chinese: Path) -> None:
    for page, other in ((english, chinese), (chinese, english)):
        assert other in [link_target(page, link)[0] for link in links(page)]


@pytest.mark.parametrize("page", TRANSLATIONS[2], ids=["en", "zh"])
def test_quoted_output_is_that_of_qsiprep_command(page: Path) -> None:
    scheme = recognise(*gradient_table("dsi257")).description
    case = Case(False, "T1w", True, False, 2.0, ("01",), (scheme,))
    options = choose_options(Release.of("1.0.1"), case, UserOptions()).options
    printed = [f"# sub-01: {scheme}", *(f"#   {' '.join(option.arguments)}: {option.reason}" for option in options)]
    (block,) = code_blocks(page, "text")
    quoted = re.sub(r"\n# {7,}", " ", block).splitlines()
    assert quoted == printed[: len(quoted)]


def test_options_page_is_current() -> None:
    page = runpy.run_path(str(DOCS / "make_options.py"))["page"]
    assert GENERATED.read_text(encoding="utf-8") == page(), "run `python docs/make_options.py`"


def test_api_page_documents_every_public_name() -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^::: ([\w.]+)", text, re.MULTILINE))
    for module, names in dsiprep._MODULES.items():
        for name in names:
            assert module in documented or f"{module}.{name}" in documented, name
