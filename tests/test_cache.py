"""A stage runs once; a killed run goes on; results come back as they were."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from dsiprep.cache import Cache, CachedResult
from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.results import Denoised, Motion
from dsiprep.errors import InputError, OutputError
from dsiprep.settings import DenoiseSettings, MotionSettings

GRID = Grid((8, 9, 100), np.diag([2.0, 2, 3, 1]))


def stage_module(version: int = 1) -> ModuleType:
    module = ModuleType("stage")
    module.VERSION = version  # type: ignore[attr-defined]
    return module


class Counted:
    """A stage that counts how often it ran."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *inputs: object) -> Denoised:
        self.calls += 1
        generator = torch.Generator().manual_seed(3)
        data = torch.randn(40, *GRID.shape, generator=generator)
        dwi = DWI(data, GRID, np.arange(40.0), np.eye(3)[np.arange(40) % 3], np.zeros(40, int), np.zeros(40, int))
        return Denoised(dwi, Volume(data[0], GRID), None, "dwidenoise")


def source(tmp_path: Path, text: str = "input") -> CachedResult[str]:
    path = tmp_path / "input.txt"
    path.write_text(text)
    return Cache(None).files((path,), {"pe": "j"}, path.read_text)


def test_a_stage_runs_once_and_comes_back_the_same(tmp_path: Path) -> None:
    stage, run = (
        Counted(),
        lambda: Cache(tmp_path / "work").run(stage_module(), "denoise", stage, source(tmp_path), DenoiseSettings()),
    )
    first, second = run().value, run().value
    assert stage.calls == 1
    assert torch.equal(first.dwi.data, second.dwi.data)
    assert torch.equal(first.dwi.data, Counted()().dwi.data)
    np.testing.assert_array_equal(first.dwi.bvecs, second.dwi.bvecs)
    assert second.rank is None and second.method == "dwidenoise"
    assert second.dwi.grid.matches(GRID)
    assert second.noise is not None and second.noise.grid.shape == GRID.shape


@pytest.mark.parametrize(
    "change", ["settings", "version", "contents"], ids=["another setting", "another VERSION", "another input file"]
)
def test_what_changes_a_result_changes_its_key(tmp_path: Path, change: str) -> None:
    cache = Cache(tmp_path / "work")
    before = cache.run(stage_module(), "denoise", Counted(), source(tmp_path), DenoiseSettings())
    after = cache.run(
        stage_module(2 if change == "version" else 1),
        "denoise",
        Counted(),
        source(tmp_path, "other" if change == "contents" else "input"),
        DenoiseSettings(window=7 if change == "settings" else 0),
    )
    assert before.key != after.key


def test_a_later_stage_follows_its_input_but_not_the_other_way_round(tmp_path: Path) -> None:
    def lineage(denoising: DenoiseSettings, moving: MotionSettings) -> tuple[str, str]:
        cache = Cache(tmp_path / "work")
        first = cache.run(stage_module(), "denoise", Counted(), source(tmp_path), denoising)
        return first.key, cache.run(stage_module(), "motion", Counted(), first, moving).key

    base = lineage(DenoiseSettings(), MotionSettings())
    other_motion = lineage(DenoiseSettings(), MotionSettings(iters=1))
    other_denoising = lineage(DenoiseSettings(window=5), MotionSettings())
    assert base[0] == other_motion[0] and base[1] != other_motion[1]
    assert base[0] != other_denoising[0] and base[1] != other_denoising[1]


def test_a_run_killed_while_writing_leaves_nothing_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    stage = Counted()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("dsiprep.cache.Path.rename", killed)
        Cache(tmp_path / "work").run(stage_module(), "denoise", stage, DenoiseSettings())
    assert not list((tmp_path / "work").iterdir())
    Cache(tmp_path / "work").run(stage_module(), "denoise", stage, DenoiseSettings())
    assert stage.calls == 2


def test_results_with_tables_nan_and_empty_arrays_come_back(tmp_path: Path) -> None:
    volume = Volume(torch.zeros(GRID.shape), GRID)
    motion = Motion(
        transforms=np.tile(np.eye(4), (30, 1, 1)), volumes=np.arange(30), dwiref=volume, mask=volume,
        r2=np.full(30, np.nan), xcorr=np.zeros(0), slice_z=np.random.default_rng(0).normal(size=(30, 100)),
        slice_axis=2, trace=[{"iter_num": 1, "shiftX": 0.1}], model="3dSHORE", notes=("a", "b"),
    )  # fmt: skip
    back = Cache(tmp_path).run(stage_module(), "motion", lambda: motion).value
    assert np.isnan(back.r2).all() and back.xcorr.shape == (0,) and back.notes == ("a", "b")
    np.testing.assert_array_equal(back.slice_z, motion.slice_z)
    assert back.trace == motion.trace and back.volumes.dtype == motion.volumes.dtype


def test_only_found_refuses_to_compute(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--keep-work"):
        Cache(tmp_path, only_found=True).run(stage_module(), "denoise", Counted(), DenoiseSettings())


@pytest.mark.parametrize(
    "problem", [OSError("2488800 requested and 256992 written"), OSError(28, "No space left on device")]
)
def test_a_full_work_folder_is_told_and_nothing_half_written_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: OSError
) -> None:
    def full(*_: object) -> None:
        raise problem

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OutputError, match=r"(?i)no space left.*--work-dir"):
        Cache(tmp_path / "work").run(stage_module(), "denoise", Counted(), source(tmp_path), DenoiseSettings())
    assert not list((tmp_path / "work").iterdir())
