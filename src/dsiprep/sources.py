"""Digests of dsiprep's own source: what a module computes depends on every module of the package that it reaches.

Results of stages and machine code of kernels are kept under such digests, so none outlives a change of the code that
made it.
"""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path

__all__ = ["modules_reached", "package_digest", "source_digest"]

ROOT = Path(__file__).parent
PACKAGE = ROOT.name


@cache
def source_digest(module: str) -> str:
    """SHA-256 of the source of a module of dsiprep and of all modules of dsiprep that it imports, at any depth.

    Parameters
    ----------
    module : str
        Dotted name, such as "dsiprep.stages.motion".
    """
    digest = hashlib.sha256()
    for name in modules_reached(module):
        digest.update(name.encode() + b"\0" + _file_of(name).read_bytes() + b"\0")
    return digest.hexdigest()


@cache
def package_digest() -> str:
    """SHA-256 of all modules of dsiprep."""
    digest = hashlib.sha256()
    for path in sorted(ROOT.rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def modules_reached(module: str) -> list[str]:
    """A module of dsiprep and those that it imports, at any depth and also inside functions; sorted by name."""
    found, waiting = set[str](), [module]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += _imports_of(name)
    return sorted(found)


@cache
def _imports_of(module: str) -> tuple[str, ...]:
    names = []
    for node in ast.walk(ast.parse(_file_of(module).read_bytes())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    ours = (name for name in names if name.split(".")[0] == PACKAGE and name != PACKAGE)
    return tuple(name for name in ours if _file_of(name).is_file())


def _file_of(module: str) -> Path:
    path = ROOT.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
