"""Replace commands in the interfaces of QSIPrep, using the syntax tree of their source.

The tree gives the byte offsets of a constant; only these bytes are replaced. The same change is made in the tree, and
the new source must parse to exactly this tree.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from dsiprep.errors import InputError, SettingsError
from dsiprep.qsiprep.source_code import Source

GPU = "gpu"
# Switches of the FreeSurfer interfaces, and the default that makes them use a GPU.
GPU_SWITCHES = {"--cpu": False, "-g": True, "--gpu": True}


@dataclass(frozen=True)
class Swap:
    """A command and its replacement: another command, or `gpu` for the same command on the GPU."""

    command: str
    replacement: str

    @classmethod
    def of(cls, text: str) -> Swap:
        """Parse "mri_synthseg=gpu" or "DRBUDDI=DRBUDDI_cuda"; raise SettingsError if invalid."""
        if not re.fullmatch(r"[\w./+-]+=[\w./+-]+", text, re.ASCII):
            raise SettingsError(f"--swap {text}: expected COMMAND=REPLACEMENT, such as DRBUDDI=DRBUDDI_cuda")
        command, replacement = text.split("=")
        if command == replacement:
            raise SettingsError(f"--swap {text}: the replacement is the same command; give another")
        return cls(command, replacement)


@dataclass(frozen=True)
class ExpectedValue:
    """An expression of a class in the new module, and the value it must have."""

    class_name: str
    expression: str
    value: str | bool


@dataclass(frozen=True)
class PatchedModule:
    """A module with replaced commands.

    Attributes
    ----------
    module : str
        Path in the package, such as "interfaces/tortoise.py".
    before, after : bytes
        Original and modified source.
    expected : tuple of ExpectedValue
        Effect of the change, checked inside the image.
    lines : tuple of int
        Changed lines.
    """

    module: str
    before: bytes
    after: bytes
    expected: tuple[ExpectedValue, ...]
    lines: tuple[int, ...]


class _ModuleEditor:
    """The source of a module, its syntax tree, and the changes made to both."""

    def __init__(self, name: str, text: bytes) -> None:
        self.name, self.text = name, text
        try:
            self.tree = ast.parse(text)
        except (SyntaxError, ValueError) as problem:
            raise InputError(f"{name} cannot be parsed as Python ({problem}); is it a QSIPrep module?") from None
        lengths = [len(line) for line in text.splitlines(keepends=True)]
        self.starts = [sum(lengths[:index]) for index in range(len(lengths))]
        self.edits: list[tuple[int, int, bytes]] = []
        self.expected: list[ExpectedValue] = []
        self.lines: list[int] = []

    def span(self, node: ast.expr | ast.keyword) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset

    def replace(self, node: ast.Constant, value: str | bool) -> None:
        """Replace a constant; a string keeps its quotes."""
        start, end = self.span(node)
        literal = repr(value).encode()
        if isinstance(value, str) and (plain := re.fullmatch(rb"(['\"])[^'\"\\]*\1", self.text[start:end])):
            literal = plain[1] + value.encode() + plain[1]
        self.edits.append((start, end, literal))
        self.lines.append(node.lineno)
        node.value = value

    def switch_on(self, call: ast.Call) -> None:
        """Give a `traits.Bool` without a default the default True."""
        parts: list[ast.expr | ast.keyword] = [*call.args, *call.keywords]
        start, end = self.span(parts[0])[0], self.span(parts[-1])[1]
        self.edits += [(start, start, b"True, "), (end, end, b", usedefault=True")]
        self.lines.append(call.lineno)
        call.args.insert(0, ast.Constant(True))
        call.keywords.append(ast.keyword("usedefault", ast.Constant(True)))

    def result(self) -> PatchedModule:
        """Return the modified module; raise InputError if it does not parse to the modified tree."""
        after = self.text
        for start, end, literal in sorted(self.edits, reverse=True):
            after = after[:start] + literal + after[end:]
        try:
            matches = ast.dump(ast.parse(after)) == ast.dump(self.tree)
        except SyntaxError:
            matches = False
        if not matches:
            raise InputError(
                f"{self.name}: the modified source does not parse as intended, so nothing was written; its encoding or "
                "syntax is not supported. Edit the module by hand"
            )
        return PatchedModule(self.name, self.text, after, tuple(self.expected), tuple(sorted(self.lines)))


def apply_swaps(source: Source, swaps: list[Swap]) -> list[PatchedModule]:
    """Apply all swaps to the modules that contain their commands.

    Parameters
    ----------
    source : Source
        Modules of QSIPrep.
    swaps : list of Swap

    Returns
    -------
    list of PatchedModule
        The changed modules.

    Raises
    ------
    SettingsError
        If no interface calls a command, or if its interface has no switch for the GPU.
    InputError
        If a module cannot be parsed, or if the modified source does not parse as intended.
    """
    editors = [_ModuleEditor(name, text) for name, text in sorted(source.interfaces().items())]
    for swap in swaps:
        applied = [_apply_swap(editor, swap) for editor in editors]
        if not any(applied):
            raise SettingsError(_not_found(swap, editors, source.origin))
    return [editor.result() for editor in editors if editor.edits]


def commands(module: ast.Module) -> Iterator[tuple[ast.ClassDef, ast.Constant, bool]]:
    """Yield the strings that classes assign to `_cmd`: class, constant, and whether it is a class attribute."""
    for owner in (node for node in ast.walk(module) if isinstance(node, ast.ClassDef)):
        for node in ast.walk(owner):
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None and _sets_command(node):
                for part in ast.walk(node.value):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        yield owner, part, node in owner.body


def _sets_command(node: ast.Assign | ast.AnnAssign) -> bool:
    for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
        name = target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", None)
        if name == "_cmd":
            return True
    return False


def _apply_swap(editor: _ModuleEditor, swap: Swap) -> bool:
    matches = [entry for entry in commands(editor.tree) if entry[1].value == swap.command]
    for owner, constant, is_class_attribute in matches:
        if swap.replacement == GPU:
            _use_gpu(editor, owner, swap)
            continue
        editor.replace(constant, swap.replacement)
        if is_class_attribute:
            editor.expected.append(ExpectedValue(owner.name, "_cmd", swap.replacement))
    return bool(matches)


def _use_gpu(editor: _ModuleEditor, owner: ast.ClassDef, swap: Swap) -> None:
    """Change the default of the interface's `--cpu` switch to False, or of its `-g` or `--gpu` switch to True."""
    for name, switch, call in _gpu_switches(editor.tree, owner):
        default = call.args[0] if call.args else None
        if default is None and GPU_SWITCHES[switch]:
            editor.switch_on(call)
        elif isinstance(default, ast.Constant) and isinstance(default.value, bool):
            if default.value != GPU_SWITCHES[switch]:
                editor.replace(default, GPU_SWITCHES[switch])
        else:
            continue
        editor.expected.append(ExpectedValue(owner.name, f"input_spec().{name}", GPU_SWITCHES[switch]))
        return
    raise SettingsError(
        f"--swap {swap.command}={swap.replacement}: its interface ({owner.name}, {editor.name}) has no switch "
        f"{', '.join(GPU_SWITCHES)}; give another command instead"
    )


def _gpu_switches(tree: ast.Module, owner: ast.ClassDef) -> Iterator[tuple[str, str, ast.Call]]:
    """Yield the CPU and GPU switches of an interface: trait name, switch, and the call that creates the trait."""
    class_attributes = {
        node.targets[0].id: node.value.id
        for node in owner.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Name)
    }
    for spec in tree.body:
        if not isinstance(spec, ast.ClassDef) or spec.name != class_attributes.get("input_spec"):
            continue
        for node in spec.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                for keyword in node.value.keywords:
                    option = getattr(keyword.value, "value", None)
                    if keyword.arg == "argstr" and option in GPU_SWITCHES:
                        yield ast.unparse(node.targets[0]), option, node.value


def _not_found(swap: Swap, editors: list[_ModuleEditor], origin: str) -> str:
    known = sorted({str(constant.value) for editor in editors for _, constant, _ in commands(editor.tree)})
    return (
        f"--swap {swap.command}={swap.replacement}: no interface in {origin} calls {swap.command}; they call "
        f"{', '.join(known)}"
    )
