"""The picture in docs/architecture.md against the package's imports."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from dsiprep import sources

PROJECT = Path(__file__).parents[1]
PAGE = PROJECT / "docs" / "architecture.md"
MAX_FILE, MAX_BODY = 400, 60  # lines; of a function without its docstring
Edges = set[tuple[str, str]]


def _room(module: str) -> str:
    """Name of a module's box: the top-level package or module, and one more level inside `ops`."""
    parts = module.split(".")[1:]
    return ".".join(parts[:2]) if parts[0] == "ops" else parts[0]


def _modules() -> list[str]:
    files = (path.relative_to(sources.ROOT) for path in sources.ROOT.rglob("*.py") if path.name != "__init__.py")
    return [".".join(("dsiprep", *path.with_suffix("").parts)) for path in files]


def _imports() -> Edges:
    edges = {(_room(module), _room(other)) for module in _modules() for other in sources._imports_of(module)}
    return {(one, other) for one, other in edges if one != other and other != "ops"}


def _reached(start: str, edges: Edges) -> set[str]:
    found, waiting = set[str](), [start]
    while waiting:
        new = {other for one, other in edges if one == waiting[-1]} - found
        waiting.pop()
        found |= new
        waiting += new
    return found


def _drawn() -> Edges:
    picture = re.search(r"```mermaid\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert picture
    return set(re.findall(r"^\s*([\w.]+)(?:\[[^\]]*\])? --> ([\w.]+)", picture[1], re.MULTILINE))


def test_picture_shows_the_imports_without_those_that_follow_from_others() -> None:
    edges = _imports()
    assert not any(one in _reached(one, edges) for one, _ in edges), "circular imports between rooms"
    needed = {(one, other) for one, other in edges if other not in _reached(one, edges - {(one, other)})}
    assert _drawn() == needed


def test_every_room_of_the_picture_is_described() -> None:
    table = PAGE.read_text(encoding="utf-8").split("## Rooms")[1].split("\n## ")[0]
    rooms = {_room(module) for module in _modules()} - {"__main__"}
    missing = {room for room in rooms if f"`{room.replace('.', '/')}/`" not in table and f"`{room}.py`" not in table}
    assert not missing


def _body_lines(function: ast.FunctionDef) -> int:
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_files_and_functions_are_short() -> None:
    long = []
    for path in (path for room in ("src", "tests", "benchmarks") for path in (PROJECT / room).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if (lines := text.count("\n")) > MAX_FILE:
            long.append(f"{path}: {lines} lines")
        functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        long += [f"{path}: {f.name}, {_body_lines(f)} lines" for f in functions if _body_lines(f) > MAX_BODY]
    assert not long
