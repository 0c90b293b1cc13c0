"""GPU tasks that a release of QSIPrep supports without changes, read from its command-line parser."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from dsiprep.qsiprep.command_patches import GPU, Swap
from dsiprep.qsiprep.source_code import Source

PARSER, TASKS = "cli/parser.py", "utils/gpu.py"


def gpu_tasks(source: Source) -> dict[str, str | None]:
    """Return the values of `--gpu` and the program that each task calls; empty if the release has no such option.

    If the source contains only one module and not the parser, the tasks are the classes that define a `_cuda_cmd`.

    Parameters
    ----------
    source : Source
        Modules of QSIPrep.

    Returns
    -------
    dict of str to str or None
        `{"drbuddi": "DRBUDDI_cuda", ...}`; None if the release selects the program itself.
    """
    if PARSER in source.modules:
        if not any("--gpu" in option_strings(call) for call in add_argument_calls(source.modules[PARSER])):
            return {}
        return _task_table(source.modules.get(TASKS, b""))
    return dict(_cuda_commands(source.modules))


def task_of(swap: Swap, tasks: dict[str, str | None]) -> str | None:
    """Return the task of `--gpu` with the effect of a swap, or None."""
    program = swap.command if swap.replacement == GPU else swap.replacement
    return next((task for task, task_program in tasks.items() if task_program == program), None)


def add_argument_calls(parser: bytes) -> Iterator[ast.Call]:
    """Yield all `add_argument` calls in the source of a parser."""
    for node in ast.walk(ast.parse(parser)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            yield node


def option_strings(call: ast.Call) -> list[str]:
    """Option strings of an `add_argument` call."""
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
