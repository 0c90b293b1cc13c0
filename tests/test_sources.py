"""Source digests: they follow every module that is reached, and stage keys and kernel caches follow them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dsiprep
from dsiprep import cache as cache_module
from dsiprep import sources
from dsiprep.cache import Cache
from dsiprep.sources import modules_reached, source_digest
from dsiprep.stages import motion

PACKAGE = Path(dsiprep.__file__).parent
FILES = {
    "__init__.py": "",
    "stages/__init__.py": "",
    "stages/one.py": "from dsiprep.ops import kernels\n\ndef run():\n    from dsiprep.late import value\n",
    "ops/__init__.py": "",
    "ops/kernels.py": "from dsiprep.ops.deep import (\n    a,\n    b,\n)\n",
    "ops/deep.py": "a = b = 1\n",
    "late.py": "value = 1\n",
    "apart.py": "value = 1\n",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small package in place of dsiprep's own source."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    _forget()
    yield tmp_path
    _forget()


def _forget() -> None:
    source_digest.cache_clear()
    sources._imports_of.cache_clear()


@pytest.mark.parametrize(
    ("changed", "matters"),
    [("stages/one.py", True), ("ops/kernels.py", True), ("ops/deep.py", True), ("late.py", True), ("apart.py", False)],
)
def test_digest_follows_every_module_that_is_reached(package: Path, changed: str, matters: bool) -> None:
    before = source_digest("dsiprep.stages.one")
    (package / changed).write_text(FILES[changed] + "# changed\n")
    _forget()
    assert (source_digest("dsiprep.stages.one") != before) == matters


def test_motion_stage_reaches_its_kernels_and_not_the_report() -> None:
    reached = modules_reached("dsiprep.stages.motion")
    assert {"dsiprep.ops.image.bspline", "dsiprep.ops.motion.gauss_newton_kernels", "dsiprep.settings"} <= set(reached)
    assert not any(name.startswith(("dsiprep.report", "dsiprep.cli", "dsiprep.io")) for name in reached)


def test_stage_key_follows_source_library_versions_and_calling_function(monkeypatch: pytest.MonkeyPatch) -> None:
    def one() -> int:
        return 1

    def two() -> int:
        return 2

    def key(function: object = one) -> str:
        return Cache(None).run(motion, "motion", function).key  # type: ignore[arg-type]

    before = key()
    assert key() == before
    assert key(two) != before
    with monkeypatch.context() as patched:
        patched.setattr(cache_module, "source_digest", lambda name: f"another {name}")
        assert key() != before
    monkeypatch.setitem(cache_module.LIBRARIES, "torch", "0")
    assert key() != before


KERNEL = """
import numpy as np
from dsiprep.ops.image import eddy_displacement, interpolation
from dsiprep.ops.motion.gauss_newton_kernels import *
from dsiprep.ops.image.bspline import cubic_weights
from dsiprep.compiled import _cache_folder
points = np.array([[2.5], [3.25], [2.75]], np.float32)
volume = np.arange(216, dtype=np.float32).reshape(1, 6, 6, 6)
print(float(interpolation._cubic_loop(volume, points)[0, 0]), _cache_folder())
"""


def _run(tree: Path, **environment: str) -> list[str]:
    variables = {**os.environ, "PYTHONPATH": str(tree), "NUMBA_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", KERNEL], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_machine_code_follows_a_function_inlined_from_another_file(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "dsiprep", ignore=shutil.ignore_patterns("__pycache__"))
    cached = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    first = _run(tmp_path, **cached)[0]
    assert _run(tmp_path, **cached)[0] == first
    inlined = tmp_path / "dsiprep" / "ops" / "image" / "bspline.py"
    changed = inlined.read_text().replace("g * g * g * sixth,", "g * g * g * half,")
    assert changed != inlined.read_text()
    inlined.write_text(changed)
    assert _run(tmp_path, **cached)[0] != first


def test_import_and_kernels_work_without_any_writable_folder(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "file")
    Path(nowhere).write_text("")
    value, folder = _run(PACKAGE.parent, NUMBA_CACHE_DIR=nowhere, XDG_CACHE_HOME=nowhere, HOME=nowhere, TMPDIR=nowhere)
    assert float(value) > 0
    assert folder == "None" or not folder.startswith(str(tmp_path))
