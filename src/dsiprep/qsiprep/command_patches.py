"""Other commands in QSIPrep's interfaces, changed through the syntax tree.

The tree tells where a constant stands, as offsets in bytes; those bytes are replaced and no others. The same change is
made in the tree, and the new text must parse to exactly that tree.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from dsiprep.errors import InputError, SettingsError
from dsiprep.qsiprep.source_code import Source

GPU = "gpu"
# Switches of the FreeSurfer interfaces, and what their default has to be for a GPU.
SWITCHES = {"--cpu": False, "-g": True, "--gpu": True}


@dataclass(frozen=True)
class Swap:
    """A command and what is to be called instead: another command, or the same one on the GPU (`gpu`)."""

    command: str
    replacement: str

    @classmethod
    def of(cls, text: str) -> Swap:
        """From "mri_synthseg=gpu" or "DRBUDDI=DRBUDDI_cuda"; raises SettingsError."""
        if not re.fullmatch(r"[\w./+-]+=[\w./+-]+", text, re.ASCII):
            raise SettingsError(f"--swap {text}: COMMAND=REPLACEMENT is wanted, as in DRBUDDI=DRBUDDI_cuda")
        command, replacement = text.split("=")
        if command == replacement:
            raise SettingsError(f"--swap {text}: both are the same command; name another")
        return cls(command, replacement)


@dataclass(frozen=True)
class Fact:
    """What has to be true of a class in the new module: `expression` of the class, and its value."""

    owner: str
    expression: str
    value: str | bool


@dataclass(frozen=True)
class Patched:
    """One module with other commands.

    Attributes
    ----------
    module : str
        "interfaces/tortoise.py".
    before, after : bytes
    facts : tuple of Fact
        What the change amounts to, for a check inside the image.
    lines : tuple of int
        Where it was changed.
    """

    module: str
    before: bytes
    after: bytes
    facts: tuple[Fact, ...]
    lines: tuple[int, ...]


class _Text:
    """A module's bytes, its tree, and the changes made to both."""

    def __init__(self, name: str, text: bytes) -> None:
        self.name, self.text = name, text
        try:
            self.tree = ast.parse(text)
        except (SyntaxError, ValueError) as problem:
            raise InputError(f"{name}: not readable as Python ({problem}); is it QSIPrep's?") from None
        lengths = [len(line) for line in text.splitlines(keepends=True)]
        self.starts = [sum(lengths[:index]) for index in range(len(lengths))]
        self.edits: list[tuple[int, int, bytes]] = []
        self.facts: list[Fact] = []
        self.lines: list[int] = []

    def span(self, node: ast.expr | ast.keyword) -> tuple[int, int]:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset

    def replace(self, node: ast.Constant, value: str | bool) -> None:
        """Another value in place of a constant, in its own quotes."""
        start, end = self.span(node)
        literal = repr(value).encode()
        if isinstance(value, str) and (plain := re.fullmatch(rb"(['\"])[^'\"\\]*\1", self.text[start:end])):
            literal = plain[1] + value.encode() + plain[1]
        self.edits.append((start, end, literal))
        self.lines.append(node.lineno)
        node.value = value

    def switch_on(self, call: ast.Call) -> None:
        """A `traits.Bool` without a default gets True, and uses it."""
        parts: list[ast.expr | ast.keyword] = [*call.args, *call.keywords]
        start, end = self.span(parts[0])[0], self.span(parts[-1])[1]
        self.edits += [(start, start, b"True, "), (end, end, b", usedefault=True")]
        self.lines.append(call.lineno)
        call.args.insert(0, ast.Constant(True))
        call.keywords.append(ast.keyword("usedefault", ast.Constant(True)))

    def finished(self) -> Patched:
        after = self.text
        for start, end, literal in sorted(self.edits, reverse=True):
            after = after[:start] + literal + after[end:]
        try:
            agrees = ast.dump(ast.parse(after)) == ast.dump(self.tree)
        except SyntaxError:
            agrees = False
        if not agrees:
            raise InputError(
                f"{self.name}: the change did not come out as meant, and nothing was written; the file is encoded or "
                "written in a way that was not foreseen. Change it by hand"
            )
        return Patched(self.name, self.text, after, tuple(self.facts), tuple(sorted(self.lines)))


def apply_swaps(source: Source, swaps: list[Swap]) -> list[Patched]:
    """Make all swaps in the modules that hold their commands.

    Parameters
    ----------
    source : Source
        QSIPrep's modules.
    swaps : list of Swap

    Returns
    -------
    list of Patched
        The modules that changed.

    Raises
    ------
    SettingsError
        If no interface calls a command, or one cannot be told to use a GPU.
    InputError
        If a module cannot be read, or the result does not parse to what was meant.
    """
    texts = [_Text(name, text) for name, text in sorted(source.interfaces().items())]
    for swap in swaps:
        done = [_swap(text, swap) for text in texts]
        if not any(done):
            raise SettingsError(_not_found(swap, texts, source.origin))
    return [text.finished() for text in texts if text.edits]


def commands(module: ast.Module) -> Iterator[tuple[ast.ClassDef, ast.Constant, bool]]:
    """Every string that a class gives to `_cmd`: the class, the constant, and whether it is the class's own default."""
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


def _swap(text: _Text, swap: Swap) -> bool:
    found = [entry for entry in commands(text.tree) if entry[1].value == swap.command]
    for owner, constant, default in found:
        if swap.replacement == GPU:
            _use_gpu(text, owner, swap)
            continue
        text.replace(constant, swap.replacement)
        if default:
            text.facts.append(Fact(owner.name, "_cmd", swap.replacement))
    return bool(found)


def _use_gpu(text: _Text, owner: ast.ClassDef, swap: Swap) -> None:
    """The interface's `--cpu` is no longer given by default, or its `-g` is."""
    for name, switch, call in _switches(text.tree, owner):
        default = call.args[0] if call.args else None
        if default is None and SWITCHES[switch]:
            text.switch_on(call)
        elif isinstance(default, ast.Constant) and isinstance(default.value, bool):
            if default.value != SWITCHES[switch]:
                text.replace(default, SWITCHES[switch])
        else:
            continue
        text.facts.append(Fact(owner.name, f"input_spec().{name}", SWITCHES[switch]))
        return
    raise SettingsError(
        f"--swap {swap.command}={swap.replacement}: its interface ({owner.name}, {text.name}) has no switch "
        f"{', '.join(SWITCHES)}; give the name of another command"
    )


def _switches(tree: ast.Module, owner: ast.ClassDef) -> Iterator[tuple[str, str, ast.Call]]:
    """The CPU and GPU switches among an interface's inputs: name, option, and the call that makes the trait."""
    named = {node.targets[0].id: node.value.id for node in owner.body
             if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
             and isinstance(node.value, ast.Name)}  # fmt: skip
    for spec in tree.body:
        if not isinstance(spec, ast.ClassDef) or spec.name != named.get("input_spec"):
            continue
        for node in spec.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                for keyword in node.value.keywords:
                    option = getattr(keyword.value, "value", None)
                    if keyword.arg == "argstr" and option in SWITCHES:
                        yield ast.unparse(node.targets[0]), option, node.value


def _not_found(swap: Swap, texts: list[_Text], origin: str) -> str:
    known = sorted({str(constant.value) for text in texts for _, constant, _ in commands(text.tree)})
    return (
        f"--swap {swap.command}={swap.replacement}: no interface in {origin} calls {swap.command}; they call "
        f"{', '.join(known)}"
    )
