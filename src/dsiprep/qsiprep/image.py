"""A QSIPrep image whose interfaces call other commands: `dsiprep-tools qsiprep-image`.

Written are the changed modules, a Dockerfile or Apptainer definition, a check that runs inside the image while it is
built, a build script and the difference. Nothing is built here.
"""

from __future__ import annotations

import difflib
import hashlib
from dataclasses import dataclass
from pathlib import Path
from pprint import pformat

from dsiprep.errors import OutputError, SettingsError
from dsiprep.qsiprep.command_patches import GPU, Patched, Swap, apply_swaps
from dsiprep.qsiprep.gpu_support import gpu_tasks, task_of
from dsiprep.qsiprep.releases import Release
from dsiprep.qsiprep.source_code import Source, find_source

DRBUDDI = Swap("DRBUDDI", "DRBUDDI_cuda")
INSIDE = "/opt/dsiprep"  # where the image keeps the check
# What a program must find in the image's Python to run on a GPU at all, and how to see it.
LIBRARIES = {"mri_synthseg": ("tensorflow", "test.is_built_with_cuda()"), "mri_synthstrip": ("torch", "version.cuda")}

CHECK = '''"""Stops the build of the image unless Python takes the changed modules and finds the programs."""

import importlib
import shutil
import sys

MODULES = {modules}
FACTS = {facts}
PROGRAMS = {programs}
LIBRARIES = {libraries}

for name, path in MODULES.items():
    found = importlib.import_module(name).__file__
    print(name, "is", found)
    if found != path:
        sys.exit(f"{{name}} is imported from {{found}}, not from {{path}}: the change would have no effect")
for name, owner, expression, value in FACTS:
    found = eval(f"owner.{{expression}}", {{"owner": getattr(sys.modules[name], owner)}})
    print(f"{{owner}}.{{expression}} is {{found!r}}")
    if found != value:
        sys.exit(f"{{owner}}.{{expression}} of {{name}} is {{found!r}}, not {{value!r}}")
for program in PROGRAMS:
    print(program, "is", shutil.which(program))
    if shutil.which(program) is None:
        sys.exit(f"{{program}} is not on the PATH of this image")
for library, expression in LIBRARIES:
    if not eval(f"library.{{expression}}", {{"library": importlib.import_module(library)}}):
        sys.exit(f"{{library}} of this image was built without CUDA: its programs would stay on the CPU")
print("The changed modules are in place.")
'''


@dataclass(frozen=True)
class Recipe:
    """What to build, as files.

    Attributes
    ----------
    release : Release
    origin : str
        Where the modules came from.
    patched : tuple of Patched
        Empty where the release needs no change.
    options : tuple of str
        Tasks for the release's own `--gpu` that do what was asked for.
    files : dict of str to bytes
        By name.
    build : str
        The file to run, or an empty string.
    """

    release: Release
    origin: str
    patched: tuple[Patched, ...]
    options: tuple[str, ...]
    files: dict[str, bytes]
    build: str


def plan_image(
    version: str, swaps: list[str] | None = None, source: Path | None = None, apptainer: bool = False
) -> Recipe:
    """What an image of a release with other commands is made of.

    Parameters
    ----------
    version : str
        "1.0.1".
    swaps : list of str, optional
        "COMMAND=REPLACEMENT" beside DRBUDDI=DRBUDDI_cuda, which is always in; REPLACEMENT is a command, or `gpu`.
    source : Path, optional
        Wheel, package folder or module; found by itself otherwise.
    apptainer : bool
        An Apptainer definition instead of a Dockerfile.

    Returns
    -------
    Recipe

    Raises
    ------
    SettingsError
        If a swap cannot be made.
    InputError
        If the source cannot be had or read.
    """
    release = Release.of(version)
    wanted = [DRBUDDI, *(Swap.of(text) for text in swaps or ())]
    _require_one_each(wanted)
    found = find_source(release, source)
    tasks = gpu_tasks(found)
    options = tuple(task for swap in wanted if (task := task_of(swap, tasks)))
    left = [swap for swap in wanted if task_of(swap, tasks) is None]
    patched = tuple(apply_swaps(found, left)) if left else ()
    if not patched:
        return Recipe(release, found.origin, (), options, {}, "")
    files = _files(release, found, patched, left, apptainer)
    return Recipe(release, found.origin, patched, options, files, "build.sh")


def write_image(recipe: Recipe, folder: Path) -> None:
    """Write the files of a recipe; raises OutputError where that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in recipe.files.items():
            beside = folder / f".{name}.part"
            beside.write_bytes(content)
            beside.chmod(0o755 if name.endswith(".sh") else 0o644)  # everyone in the container reads the modules
            beside.replace(folder / name)
    except OSError as problem:
        raise OutputError(f"{folder}: cannot be written ({problem.strerror}); choose another with -o") from None


def explain_image(recipe: Recipe, folder: Path) -> str:
    """What was changed and what to do now, for people."""
    release = recipe.release
    lines = [f"QSIPrep {release.version}, from {recipe.origin}"]
    if not release.checked:
        lines.append("This release is not among those that dsiprep knows; the build checks where its modules are.")
    if recipe.options:
        tasks = " ".join(recipe.options)
        lines.append(
            f"Needs no change for {tasks}: this release has an option for it. Give QSIPrep\n  --gpu {tasks}\n"
            "and the container --gpus all (Docker) or --nv (Apptainer)."
        )
    if not recipe.patched:
        return "\n".join(lines)
    for patch in recipe.patched:
        lines.append(f"Changed: {patch.module}, line {', '.join(map(str, patch.lines))}; all other bytes are as before")
    lines += [recipe.files["changes.diff"].decode(), f"Written to {folder}: {', '.join(recipe.files)}"]
    return "\n".join([*lines, *_next_steps(recipe, folder)])


def _next_steps(recipe: Recipe, folder: Path) -> list[str]:
    release = recipe.release
    steps = [f"Build it:  sh {folder / recipe.build}"]
    if "Dockerfile" in recipe.files:
        steps.append(f"Keep it:   docker save -o {_stem(release)}.tar {release.custom}")
    steps.append(f"Run it:    dsiprep-tools qsiprep-command BIDS_DIR OUT --version {release.version} --gpu")
    if any(patch.module == "interfaces/tortoise.py" for patch in recipe.patched):
        steps.append(
            "DRBUDDI_cuda stops on some cards with `too many resources requested for launch` or out of memory "
            f"(TORTOISEV4 issues 14, 22 and 35). Then use {release.image}, which runs DRBUDDI on the CPU."
        )
    return steps


def _require_one_each(swaps: list[Swap]) -> None:
    seen: dict[str, Swap] = {}
    for swap in swaps:
        if swap.command in seen and seen[swap.command] != swap:
            raise SettingsError(
                f"--swap {swap.command}={swap.replacement}: {swap.command} is already swapped for "
                f"{seen[swap.command].replacement}; give it once"
            )
        seen[swap.command] = swap


def _stem(release: Release) -> str:
    return f"qsiprep-{release.version}-gpu"


def _files(
    release: Release, source: Source, patched: tuple[Patched, ...], swaps: list[Swap], apptainer: bool
) -> dict[str, bytes]:
    recipe = _definition(release, patched) if apptainer else _dockerfile(release, patched)
    texts = {
        f"{_stem(release)}.def" if apptainer else "Dockerfile": recipe,
        "check.py": _check(release, patched, swaps),
        "build.sh": _build_script(release, apptainer),
        "changes.diff": "".join(_difference(patch) for patch in patched),
    }
    modules = {_name(patch): patch.after for patch in patched}
    return {**modules, **{name: text.encode() for name, text in texts.items()}}


def _name(patch: Patched) -> str:
    return patch.module.rpartition("/")[2]


def _place(release: Release, patch: Patched) -> str:
    return f"{release.site_packages}/qsiprep/{patch.module}"


def _sums(release: Release, patched: tuple[Patched, ...]) -> list[str]:
    """Shell lines that fail unless the image holds the very modules that were changed, at the expected place."""
    return [
        f'echo "{hashlib.sha256(patch.before).hexdigest()}  {_place(release, patch)}" | sha256sum -c -'
        for patch in patched
    ]


def _dockerfile(release: Release, patched: tuple[Patched, ...]) -> str:
    lines = [f"FROM {release.image}", "", "# The image must hold the very modules that were changed, at this place."]
    lines += [f"RUN {line}" for line in _sums(release, patched)]
    lines += ["", *(f"COPY {_name(patch)} {_place(release, patch)}" for patch in patched), ""]
    lines += ["# And Python must take the changed ones.", f"COPY check.py {INSIDE}/check.py"]
    return "\n".join([*lines, f"RUN {release.environment}/bin/python {INSIDE}/check.py", ""])


def _definition(release: Release, patched: tuple[Patched, ...]) -> str:
    lines = ["Bootstrap: docker", f"From: {release.image}", "", "%files"]
    lines += [f"    {name} {INSIDE}/{name}" for name in [*map(_name, patched), "check.py"]]
    lines += ["", "%post", "    set -e", "    # The image must hold the very modules that were changed, at this place."]
    lines += [f"    {line}" for line in _sums(release, patched)]
    lines += [f"    cp {INSIDE}/{_name(patch)} {_place(release, patch)}" for patch in patched]
    lines += ["", "%test", "    # Runs at the end of the build: Python must take the changed modules."]
    return "\n".join([*lines, f"    {release.environment}/bin/python {INSIDE}/check.py", ""])


def _check(release: Release, patched: tuple[Patched, ...], swaps: list[Swap]) -> str:
    names = {patch.module: f"qsiprep.{patch.module.removesuffix('.py').replace('/', '.')}" for patch in patched}
    facts = [
        (names[patch.module], fact.owner, fact.expression, fact.value) for patch in patched for fact in patch.facts
    ]
    return CHECK.format(
        modules=_literal({names[patch.module]: _place(release, patch) for patch in patched}),
        facts=_literal(facts),
        programs=_literal([swap.command if swap.replacement == GPU else swap.replacement for swap in swaps]),
        libraries=_literal([LIBRARIES[swap.command] for swap in swaps if swap.replacement == GPU]),
    )


def _literal(value: object) -> str:
    """As Python reads it, over several lines where one would be long."""
    return pformat(value, width=100)


def _build_script(release: Release, apptainer: bool) -> str:
    lines = ["#!/bin/sh", "set -eu", 'cd "$(dirname "$0")"']
    if apptainer:
        lines.append(f"apptainer build {_stem(release)}.sif {_stem(release)}.def")
    else:
        lines += [
            f"docker build -t {release.custom} .",
            "# To carry it to another machine (docker load reads it there):",
            f"# docker save -o {_stem(release)}.tar {release.custom}",
        ]
    return "\n".join([*lines, ""])


def _difference(patch: Patched) -> str:
    before, after = (text.decode().splitlines(keepends=True) for text in (patch.before, patch.after))
    return "".join(difflib.unified_diff(before, after, f"a/qsiprep/{patch.module}", f"b/qsiprep/{patch.module}"))
