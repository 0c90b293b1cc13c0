"""Write the build files of a QSIPrep image with other commands: `dsiprep-tools qsiprep-image`.

The files are the changed modules, a Dockerfile or Apptainer definition, a check that runs inside the image during the
build, a build script and the diff. The image itself is not built.
"""

from __future__ import annotations

import difflib
import hashlib
from dataclasses import dataclass
from pathlib import Path
from pprint import pformat

from dsiprep.errors import OutputError, SettingsError
from dsiprep.qsiprep.command_patches import GPU, PatchedModule, Swap, apply_swaps
from dsiprep.qsiprep.gpu_support import gpu_tasks, task_of
from dsiprep.qsiprep.releases import Release
from dsiprep.qsiprep.source_code import find_source

DRBUDDI = Swap("DRBUDDI", "DRBUDDI_cuda")
CHECK_FOLDER = "/opt/dsiprep"  # of check.py in the image
# Python library in the image that a program needs to run on a GPU, and an expression that tests its CUDA support.
LIBRARIES = {"mri_synthseg": ("tensorflow", "test.is_built_with_cuda()"), "mri_synthstrip": ("torch", "version.cuda")}

CHECK = '''"""Fail the build unless Python imports the changed modules and finds the programs."""

import importlib
import shutil
import sys

MODULES = {modules}
EXPECTED_VALUES = {expected}
PROGRAMS = {programs}
LIBRARIES = {libraries}

for name, path in MODULES.items():
    imported = importlib.import_module(name).__file__
    print(name, "is", imported)
    if imported != path:
        sys.exit(f"{{name}} is imported from {{imported}}, not from {{path}}: the change would have no effect")
for name, owner, expression, value in EXPECTED_VALUES:
    actual = eval(f"owner.{{expression}}", {{"owner": getattr(sys.modules[name], owner)}})
    print(f"{{owner}}.{{expression}} is {{actual!r}}")
    if actual != value:
        sys.exit(f"{{owner}}.{{expression}} of {{name}} is {{actual!r}}, not {{value!r}}")
for program in PROGRAMS:
    print(program, "is", shutil.which(program))
    if shutil.which(program) is None:
        sys.exit(f"{{program}} is not on the PATH of this image")
for library, expression in LIBRARIES:
    if not eval(f"library.{{expression}}", {{"library": importlib.import_module(library)}}):
        sys.exit(f"{{library}} of this image was built without CUDA: programs would run on the CPU")
print("The changed modules are installed correctly.")
'''


@dataclass(frozen=True)
class Recipe:
    """The build files of an image.

    Attributes
    ----------
    release : Release
    origin : str
        Description of where the modules were read from.
    patched : tuple of PatchedModule
        Empty if the release needs no change.
    gpu_tasks : tuple of str
        Values of the release's own `--gpu` option that replace swaps.
    files : dict of str to bytes
        Contents by file name.
    build : str
        Name of the build script; empty if the release needs no change.
    """

    release: Release
    origin: str
    patched: tuple[PatchedModule, ...]
    gpu_tasks: tuple[str, ...]
    files: dict[str, bytes]
    build: str


def plan_image(
    version: str, swaps: list[str] | None = None, source: Path | None = None, apptainer: bool = False
) -> Recipe:
    """Prepare the build files of a release with other commands.

    Parameters
    ----------
    version : str
        "1.0.1".
    swaps : list of str, optional
        "COMMAND=REPLACEMENT", in addition to DRBUDDI=DRBUDDI_cuda; REPLACEMENT is a command or `gpu`.
    source : Path, optional
        Wheel, package folder or module; see `find_source` for the default.
    apptainer : bool
        Write an Apptainer definition instead of a Dockerfile.

    Returns
    -------
    Recipe

    Raises
    ------
    SettingsError
        If a swap is not possible.
    InputError
        If the source is not found or cannot be read.
    """
    release = Release.of(version)
    requested = [DRBUDDI, *(Swap.of(text) for text in swaps or ())]
    _reject_conflicting_swaps(requested)
    modules = find_source(release, source)
    supported = gpu_tasks(modules)
    tasks = tuple(task for swap in requested if (task := task_of(swap, supported)))
    remaining = [swap for swap in requested if task_of(swap, supported) is None]
    patched = tuple(apply_swaps(modules, remaining)) if remaining else ()
    if not patched:
        return Recipe(release, modules.origin, (), tasks, {}, "")
    files = _files(release, patched, remaining, apptainer)
    return Recipe(release, modules.origin, patched, tasks, files, "build.sh")


def write_image(recipe: Recipe, folder: Path) -> None:
    """Write the files of a recipe; raise OutputError if the folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in recipe.files.items():
            part = folder / f".{name}.part"
            part.write_bytes(content)
            part.chmod(0o755 if name.endswith(".sh") else 0o644)  # readable by all users of the container
            part.replace(folder / name)
    except OSError as problem:
        raise OutputError(f"{folder} cannot be written ({problem.strerror}); choose another folder with -o") from None


def explain_image(recipe: Recipe, folder: Path) -> str:
    """Return a text about the changes and the next steps."""
    release = recipe.release
    lines = [f"QSIPrep {release.version}, from {recipe.origin}"]
    if not release.checked:
        lines.append("This release is unknown to dsiprep; the build checks the location of its modules.")
    if recipe.gpu_tasks:
        tasks = " ".join(recipe.gpu_tasks)
        lines.append(
            f"No change is needed for {tasks}, because this release has an option for it. Run QSIPrep with\n"
            f"  --gpu {tasks}\nand the container with --gpus all (Docker) or --nv (Apptainer)."
        )
    if not recipe.patched:
        return "\n".join(lines)
    for patch in recipe.patched:
        lines.append(f"Changed: {patch.module}, line {', '.join(map(str, patch.lines))}; all other bytes are unchanged")
    lines += [recipe.files["changes.diff"].decode(), f"Written to {folder}: {', '.join(recipe.files)}"]
    return "\n".join([*lines, *_next_steps(recipe, folder)])


def _next_steps(recipe: Recipe, folder: Path) -> list[str]:
    release = recipe.release
    steps = [f"Build:  sh {folder / recipe.build}"]
    if "Dockerfile" in recipe.files:
        steps.append(f"Save:   docker save -o {_stem(release)}.tar {release.gpu_image}")
    steps.append(f"Run:    dsiprep-tools qsiprep-command BIDS_DIR OUT --version {release.version} --gpu")
    if any(patch.module == "interfaces/tortoise.py" for patch in recipe.patched):
        steps.append(
            "On some GPUs DRBUDDI_cuda fails with `too many resources requested for launch` or runs out of memory "
            f"(TORTOISEV4 issues 14, 22 and 35). In that case use {release.image}, which runs DRBUDDI on the CPU."
        )
    return steps


def _reject_conflicting_swaps(swaps: list[Swap]) -> None:
    by_command: dict[str, Swap] = {}
    for swap in swaps:
        if swap.command in by_command and by_command[swap.command] != swap:
            raise SettingsError(
                f"--swap {swap.command}={swap.replacement}: {swap.command} is already replaced by "
                f"{by_command[swap.command].replacement}; give each command once"
            )
        by_command[swap.command] = swap


def _stem(release: Release) -> str:
    return f"qsiprep-{release.version}-gpu"


def _files(
    release: Release, patched: tuple[PatchedModule, ...], swaps: list[Swap], apptainer: bool
) -> dict[str, bytes]:
    recipe = _apptainer_definition(release, patched) if apptainer else _dockerfile(release, patched)
    texts = {
        f"{_stem(release)}.def" if apptainer else "Dockerfile": recipe,
        "check.py": _check_script(release, patched, swaps),
        "build.sh": _build_script(release, apptainer),
        "changes.diff": "".join(_diff(patch) for patch in patched),
    }
    modules = {_file_name(patch): patch.after for patch in patched}
    return {**modules, **{name: text.encode() for name, text in texts.items()}}


def _file_name(patch: PatchedModule) -> str:
    return patch.module.rpartition("/")[2]


def _path_in_image(release: Release, patch: PatchedModule) -> str:
    return f"{release.site_packages}/qsiprep/{patch.module}"


def _checksum_commands(release: Release, patched: tuple[PatchedModule, ...]) -> list[str]:
    """Shell commands that fail unless the image contains the original modules at the expected paths."""
    return [
        f'echo "{hashlib.sha256(patch.before).hexdigest()}  {_path_in_image(release, patch)}" | sha256sum -c -'
        for patch in patched
    ]


def _dockerfile(release: Release, patched: tuple[PatchedModule, ...]) -> str:
    lines = [f"FROM {release.image}", "", "# The image must contain the original modules at these paths."]
    lines += [f"RUN {line}" for line in _checksum_commands(release, patched)]
    lines += ["", *(f"COPY {_file_name(patch)} {_path_in_image(release, patch)}" for patch in patched), ""]
    lines += ["# Python must import the changed modules.", f"COPY check.py {CHECK_FOLDER}/check.py"]
    return "\n".join([*lines, f"RUN {release.environment}/bin/python {CHECK_FOLDER}/check.py", ""])


def _apptainer_definition(release: Release, patched: tuple[PatchedModule, ...]) -> str:
    lines = ["Bootstrap: docker", f"From: {release.image}", "", "%files"]
    lines += [f"    {name} {CHECK_FOLDER}/{name}" for name in [*map(_file_name, patched), "check.py"]]
    lines += ["", "%post", "    set -e", "    # The image must contain the original modules at these paths."]
    lines += [f"    {line}" for line in _checksum_commands(release, patched)]
    lines += [f"    cp {CHECK_FOLDER}/{_file_name(patch)} {_path_in_image(release, patch)}" for patch in patched]
    lines += ["", "%test", "    # Runs at the end of the build: Python must import the changed modules."]
    return "\n".join([*lines, f"    {release.environment}/bin/python {CHECK_FOLDER}/check.py", ""])


def _check_script(release: Release, patched: tuple[PatchedModule, ...], swaps: list[Swap]) -> str:
    names = {patch.module: f"qsiprep.{patch.module.removesuffix('.py').replace('/', '.')}" for patch in patched}
    expected = [
        (names[patch.module], value.class_name, value.expression, value.value)
        for patch in patched
        for value in patch.expected
    ]
    return CHECK.format(
        modules=_format_literal({names[patch.module]: _path_in_image(release, patch) for patch in patched}),
        expected=_format_literal(expected),
        programs=_format_literal([swap.command if swap.replacement == GPU else swap.replacement for swap in swaps]),
        libraries=_format_literal([LIBRARIES[swap.command] for swap in swaps if swap.replacement == GPU]),
    )


def _format_literal(value: object) -> str:
    """Python literal, on several lines if it is long."""
    return pformat(value, width=100)


def _build_script(release: Release, apptainer: bool) -> str:
    lines = ["#!/bin/sh", "set -eu", 'cd "$(dirname "$0")"']
    if apptainer:
        lines.append(f"apptainer build {_stem(release)}.sif {_stem(release)}.def")
    else:
        lines += [
            f"docker build -t {release.gpu_image} .",
            "# To copy the image to another machine (read it there with docker load):",
            f"# docker save -o {_stem(release)}.tar {release.gpu_image}",
        ]
    return "\n".join([*lines, ""])


def _diff(patch: PatchedModule) -> str:
    before, after = (text.decode().splitlines(keepends=True) for text in (patch.before, patch.after))
    return "".join(difflib.unified_diff(before, after, f"a/qsiprep/{patch.module}", f"b/qsiprep/{patch.module}"))
