"""A QSIPrep image with other commands: changes to the sources of real releases, and the build files."""

from __future__ import annotations

import ast
import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dsiprep.cli.tools import main
from dsiprep.errors import InputError, OutputError, SettingsError
from dsiprep.qsiprep.command_patches import Swap, apply_swaps
from dsiprep.qsiprep.gpu_support import gpu_tasks
from dsiprep.qsiprep.image import plan_image, write_image
from dsiprep.qsiprep.releases import Release
from dsiprep.qsiprep.source_code import Source, find_source
from helpers.qsiprep_releases import CHECKED_RELEASES, wheel_of

pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence")  # in modules of QSIPrep 0.23 and 0.24

TORTOISE = "interfaces/tortoise.py"
WITHOUT_GPU_OPTION = [version for version in CHECKED_RELEASES if not version.startswith("26.1")]
WITH_GPU_OPTION = [version for version in CHECKED_RELEASES if version.startswith("26.1")]
# Line of DRBUDDI's `_cmd` in interfaces/tortoise.py; 311 from 1.0.2 to 26.0.0.
CMD_LINE = {"0.23.0": 313, "0.24.0": 313, "1.0.0": 312, "1.0.1": 312}
# A module like those of QSIPrep, with other occurrences of the command name and non-ASCII characters.
TINY = '''# DRBUDDI: "DRBUDDI" über alles
class Other:
    name = "DRBUDDI"; _cmd = "Gibbs"  # é _cmd = "DRBUDDI"


class DRBUDDI(Base):
    é = "ü"; _cmd = "DRBUDDI"  # stays
    text = """_cmd = 'DRBUDDI'"""
'''.encode()


def tiny(text: bytes = TINY, name: str = TORTOISE) -> Source:
    return Source("a test", {name: text})


@pytest.mark.parametrize("version", WITHOUT_GPU_OPTION)
def test_only_the_command_of_a_release_changes(version: str, pytestconfig: pytest.Config) -> None:
    source = find_source(Release.of(version), wheel_of(version, pytestconfig))
    (patch,) = apply_swaps(source, [Swap("DRBUDDI", "DRBUDDI_cuda")])
    assert patch.module == TORTOISE
    assert patch.before == source.modules[TORTOISE]
    before, after = patch.before.splitlines(keepends=True), patch.after.splitlines(keepends=True)
    changed = [number for number, (old, new) in enumerate(zip(before, after, strict=True), 1) if old != new]
    assert changed == [CMD_LINE.get(version, 311)] == list(patch.lines)
    quote = b'"' if version.startswith("0.") else b"'"
    assert after[changed[0] - 1] == b"    _cmd = " + quote + b"DRBUDDI_cuda" + quote + b"\n"
    assert commands_of(patch.after) == {**commands_of(patch.before), "DRBUDDI": "DRBUDDI_cuda"}


def commands_of(text: bytes) -> dict[str, str]:
    """The `_cmd` of each class, found independently of the code under test."""
    by_class = {}
    for owner in ast.parse(text).body:
        for node in owner.body if isinstance(owner, ast.ClassDef) else []:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_cmd":
                by_class[owner.name] = ast.literal_eval(node.value)
    return by_class


@pytest.mark.parametrize("version", WITHOUT_GPU_OPTION)
def test_freesurfer_interfaces_use_the_gpu_by_default(version: str, pytestconfig: pytest.Config) -> None:
    source = find_source(Release.of(version), wheel_of(version, pytestconfig))
    (patch,) = apply_swaps(source, [Swap("mri_synthseg", "gpu"), Swap("mri_synthstrip", "gpu")])
    assert patch.module == "interfaces/freesurfer.py"
    changed_switches = {name: calls[0] for name, calls in switches_of(patch.after).items()}
    assert changed_switches["_SynthSegInputSpec.cpu"][0] == (False,)
    assert changed_switches["_SynthSegInputSpec.cpu"][1]["usedefault"]
    assert changed_switches["_SynthStripInputSpec.gpu"] == ((True,), {"argstr": "-g", "usedefault": True})
    original = switches_of(patch.before)
    assert {**original, **{name: switches_of(patch.after)[name] for name in changed_switches}} == switches_of(
        patch.after
    )
    assert abs(len(patch.after) - len(patch.before)) == len("True, " + ", usedefault=True") + len("False") - len("True")


def switches_of(text: bytes) -> dict[str, list[tuple[tuple[object, ...], dict[str, object]]]]:
    """Arguments of the `traits.Bool` of all inputs named cpu or gpu, by class and input."""
    found: dict[str, list[tuple[tuple[object, ...], dict[str, object]]]] = {}
    for owner in ast.parse(text).body:
        for node in owner.body if isinstance(owner, ast.ClassDef) else []:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("cpu", "gpu"):
                assert isinstance(node.value, ast.Call)
                assert ast.unparse(node.value.func) == "traits.Bool"
                given = tuple(map(ast.literal_eval, node.value.args))
                named = {str(word.arg): ast.literal_eval(word.value) for word in node.value.keywords}
                name = f"{owner.name}.{ast.unparse(node.targets[0])}"
                found.setdefault(name, []).append((given, named))
    return found


def test_command_assigned_to_an_instance_changes(pytestconfig: pytest.Config) -> None:
    source = find_source(Release.of("26.0.0"), wheel_of("26.0.0", pytestconfig))
    (patch,) = apply_swaps(source, [Swap("eddy_cuda10.2", "eddy_cuda11.0")])
    assert patch.before.replace(b"'eddy_cuda10.2' if", b"'eddy_cuda11.0' if") == patch.after != patch.before


@pytest.mark.parametrize("version", WITH_GPU_OPTION)
def test_gpu_option_is_detected_from_the_parser(
    version: str, pytestconfig: pytest.Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = wheel_of(version, pytestconfig)
    out = tmp_path / "image"
    assert main(["qsiprep-image", "--version", version, "-o", str(out), "--source", str(wheel)]) == 0
    assert "--gpu drbuddi" in capsys.readouterr().out
    assert not out.exists()
    assert main(["qsiprep-image", "--version", version, "-o", str(out), "--source", str(wheel),
                 "--swap", "mri_synthseg=gpu"]) == 0  # fmt: skip
    assert "--gpu drbuddi synthseg" in capsys.readouterr().out
    source = find_source(Release.of(version), wheel)
    alone = Source("tortoise.py alone", {TORTOISE: source.modules[TORTOISE]})
    assert gpu_tasks(alone)["drbuddi"] == "DRBUDDI_cuda"
    without = Source("no option", {**source.modules, "cli/parser.py": b"parser.add_argument('--gpus')\n"})
    assert gpu_tasks(without) == {}


def test_release_with_gpu_option_can_have_other_swaps(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    recipe = plan_image("26.1.1", ["dwidenoise=my_denoise"], wheel_of("26.1.1", pytestconfig))
    assert recipe.gpu_tasks == ("drbuddi",)
    assert [patch.module for patch in recipe.patched] == ["interfaces/mrtrix.py"]
    assert "/app/.pixi/envs/qsiprep/lib/python3.11/site-packages/qsiprep/interfaces/mrtrix.py" in str(
        recipe.files["Dockerfile"]
    )


def test_only_the_command_constant_is_replaced() -> None:
    (patch,) = apply_swaps(tiny(), [Swap("DRBUDDI", "DRBUDDI_cuda")])
    assert patch.after == TINY.replace('ü"; _cmd = "DRBUDDI"'.encode(), 'ü"; _cmd = "DRBUDDI_cuda"'.encode())
    windows = TINY.replace(b"\n", b"\r\n")
    (patch,) = apply_swaps(tiny(windows), [Swap("DRBUDDI", "DRBUDDI_cuda")])
    assert patch.after.replace(b"_cuda", b"") == windows


@pytest.mark.parametrize("literal", ['"DRB" "UDDI"', "r'DRBUDDI'", "'''DRBUDDI'''"])
def test_other_string_literals_are_replaced(literal: str) -> None:
    (patch,) = apply_swaps(tiny(f"class A:\n    _cmd: str = {literal}\n".encode()), [Swap("DRBUDDI", "B")])
    assert patch.after == b"class A:\n    _cmd: str = 'B'\n"


def test_source_in_another_encoding_is_rejected() -> None:
    """The byte offsets of the syntax tree are only valid for UTF-8."""
    text = "# -*- coding: latin-1 -*-\nclass A:\n    é = 'é'; _cmd = 'DRBUDDI'\n".encode("latin-1")
    with pytest.raises(InputError, match="does not parse as intended"):
        apply_swaps(tiny(text), [Swap("DRBUDDI", "DRBUDDI_cuda")])


def test_impossible_swap_is_rejected() -> None:
    with pytest.raises(SettingsError, match="no interface in a test calls topup; they call DRBUDDI, Gibbs"):
        apply_swaps(tiny(), [Swap("topup", "x")])
    with pytest.raises(SettingsError, match="has no switch --cpu"):
        apply_swaps(tiny(), [Swap("DRBUDDI", "gpu")])
    with pytest.raises(InputError, match="cannot be parsed as Python"):
        apply_swaps(tiny(b"class :"), [Swap("DRBUDDI", "x")])
    for text in ("DRBUDDI", "a=b=c", "a=b c", "x=$(y)", "a=a"):
        with pytest.raises(SettingsError):
            Swap.of(text)


@pytest.mark.parametrize("apptainer", [False, True])
def test_build_checks_the_image(apptainer: bool, tmp_path: Path) -> None:
    """The shell commands and check.py of the build run on a local folder instead of the image's site-packages."""
    given = tmp_path / "tortoise.py"
    given.write_bytes(TINY.replace(b"(Base)", b""))
    write_image(plan_image("1.0.1", source=given, apptainer=apptainer), tmp_path / "out")
    text = next(path for path in (tmp_path / "out").iterdir() if path.suffix == ".def" or path.name == "Dockerfile")
    path_in_image = "/opt/conda/envs/qsiprep/lib/python3.10/site-packages/qsiprep/interfaces/tortoise.py"
    recipe = text.read_text()
    assert re.search(r"^(FROM|From:) pennlinc/qsiprep:1\.0\.1$", recipe, re.M)
    assert path_in_image in recipe
    (line,) = re.findall(r'echo "[0-9a-f]{64}  .*', recipe)

    site = tmp_path / "site"
    module = site / "qsiprep" / "interfaces" / "tortoise.py"
    module.parent.mkdir(parents=True)
    for name in ("qsiprep/__init__.py", "qsiprep/interfaces/__init__.py"):
        (site / name).touch()
    module.write_bytes(given.read_bytes())
    original = subprocess.run(["sh", "-c", line.replace(path_in_image, str(module))], capture_output=True)
    assert original.returncode == 0
    check = (tmp_path / "out" / "check.py").read_text().replace(path_in_image, str(module))
    failed = run_check(check, site, tmp_path)
    assert failed.returncode
    assert "is 'DRBUDDI', not 'DRBUDDI_cuda'" in failed.stderr

    module.write_bytes((tmp_path / "out" / "tortoise.py").read_bytes())
    modified = subprocess.run(["sh", "-c", line.replace(path_in_image, str(module))], capture_output=True)
    assert modified.returncode != 0
    assert "DRBUDDI_cuda is not on the PATH" in run_check(check, site, tmp_path).stderr
    program = tmp_path / "bin" / "DRBUDDI_cuda"
    program.parent.mkdir()
    program.touch(mode=0o755)
    assert run_check(check, site, tmp_path).returncode == 0
    moved = run_check(check.replace(str(module), "/elsewhere/tortoise.py"), site, tmp_path)
    assert moved.returncode
    assert "not from /elsewhere" in moved.stderr


def run_check(check: str, site: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    variables = {"PYTHONPATH": str(site), "PATH": str(folder / "bin"), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, "-c", check], env=variables, capture_output=True, text=True)


def test_written_build_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = tmp_path / "tortoise.py"
    given.write_bytes(TINY)
    out = tmp_path / "out"
    assert main(["qsiprep-image", "--version", "1.0.1", "-o", str(out), "--source", str(given)]) == 0
    output = capsys.readouterr().out
    assert f"docker save -o qsiprep-1.0.1-gpu.tar {Release.of('1.0.1').gpu_image}" in output
    assert "tortoise.py, line 7" in output
    assert sorted(path.name for path in out.iterdir()) == [
        "Dockerfile", "build.sh", "changes.diff", "check.py", "tortoise.py"]  # fmt: skip
    assert (out / "tortoise.py").stat().st_mode & 0o777 == 0o644
    assert hashlib.sha256(TINY).hexdigest() in (out / "Dockerfile").read_text()
    assert subprocess.run(["sh", "-n", str(out / "build.sh")]).returncode == 0
    patched = tmp_path / "qsiprep" / "interfaces" / "tortoise.py"
    patched.parent.mkdir(parents=True)
    patched.write_bytes(TINY)
    with (out / "changes.diff").open() as difference:
        subprocess.run(["patch", "-p1"], stdin=difference, cwd=tmp_path, check=True, capture_output=True)
    assert patched.read_bytes() == (out / "tortoise.py").read_bytes()


def test_unusable_source_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        plan_image("1.0.1", source=tmp_path / "none.whl")
    with pytest.raises(InputError, match=r"has no interfaces/tortoise\.py"):
        plan_image("1.0.1", source=tmp_path)
    broken = tmp_path / "qsiprep-1.0.1-py3-none-any.whl"
    broken.write_bytes(b"PK nothing")
    with pytest.raises(InputError, match="cannot be read as a wheel"):
        plan_image("1.0.1", source=broken)
    with pytest.raises(InputError, match=r"does not contain 1\.0\.0"):
        plan_image("1.0.0", source=broken)
    with pytest.raises(SettingsError, match="already replaced"):
        plan_image("1.0.1", ["DRBUDDI=other"])
    file = tmp_path / "file"
    file.touch()
    given = tmp_path / "tortoise.py"
    given.write_bytes(TINY)
    with pytest.raises(OutputError, match="choose another folder with -o"):
        write_image(plan_image("1.0.1", source=given), file / "out")


def test_default_source_is_the_installed_package_or_pypi(
    pytestconfig: pytest.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The installed package has precedence; if neither has the release, the error names an alternative."""
    wheel_of("1.0.1", pytestconfig)  # PyPI can be reached
    assert find_source(Release.of("1.0.1")).origin == "qsiprep-1.0.1-py3-none-any.whl from PyPI"
    module = tmp_path / "qsiprep" / "interfaces" / "tortoise.py"
    module.parent.mkdir(parents=True)
    module.write_bytes(TINY)
    metadata = tmp_path / "qsiprep-1.0.1.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: qsiprep\nVersion: 1.0.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_source(Release.of("1.0.1")).modules[TORTOISE] == TINY
    with pytest.raises(InputError, match=r"no wheel on PyPI .* --source:\s+docker run .*cat pennlinc/qsiprep:99"):
        find_source(Release.of("99.0.0"))


def test_invalid_release_is_rejected_and_later_release_is_unchecked() -> None:
    for version in ("latest", "1.0", "0.19.1"):
        with pytest.raises(SettingsError, match="QSIPrep"):
            Release.of(version)
    later = Release.of("26.2.0")
    assert later.has_method_options
    assert not later.checked
