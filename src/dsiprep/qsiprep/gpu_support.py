"""Whether a release can run tasks on a GPU by itself, read from its own parser."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from dsiprep.qsiprep.command_patches import GPU, Swap
from dsiprep.qsiprep.source_code import Source

PARSER, TASKS = "cli/parser.py", "utils/gpu.py"


def gpu_tasks(source: Source) -> dict[str, str | None]:
    """What `--gpu` takes, and the program that each task then calls; empty where there is no such option.

    Where only one module is there, without the parser, a class that names a `_cuda_cmd` beside its `_cmd` tells the
    same.

    Parameters
    ----------
    source : Source
        QSIPrep's modules.

    Returns
    -------
    dict of str to str or None
        `{"drbuddi": "DRBUDDI_cuda", ...}`; None where the release finds the program itself.
    """
    if PARSER in source.modules:
        if not any("--gpu" in options(call) for call in add_argument_calls(source.modules[PARSER])):
            return {}
        return _task_table(source.modules.get(TASKS, b""))
    return dict(_cuda_commands(source.modules))


def task_of(swap: Swap, tasks: dict[str, str | None]) -> str | None:
    """The task of `--gpu` that does what a swap asks for, or None."""
    program = swap.command if swap.replacement == GPU else swap.replacement
    return next((task for task, called in tasks.items() if called == program), None)


def add_argument_calls(parser: bytes) -> Iterator[ast.Call]:
    """Every `add_argument` of a parser's source."""
    for node in ast.walk(ast.parse(parser)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            yield node


def options(call: ast.Call) -> list[str]:
    """The names of an option."""
    return [part.value for part in call.args if isinstance(part, ast.Constant) and isinstance(part.value, str)]


def _task_table(module: bytes) -> dict[str, str | None]:
    for node in ast.parse(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "GPU_TASKS":
            return dict(ast.literal_eval(node.value))
    return {}


def _cuda_commands(modules: dict[str, bytes]) -> Iterator[tuple[str, str]]:
    for text in modules.values():
        for owner in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)):
            for node in owner.body:
                if (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_cuda_cmd"
                        and isinstance(node.value, ast.Constant) and node.value.value):  # fmt: skip
                    yield owner.name.lower(), str(node.value.value)
