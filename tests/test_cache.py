"""Stage results on disk: computed once, invalidated by any change that matters, never half-written."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dsiprep.cache import Cache, CachedResult
from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.results import Denoised, Motion
from dsiprep.errors import InputError, OutputError
from dsiprep.io import nifti
from dsiprep.mapped import release_memory
from dsiprep.settings import DenoiseSettings, MotionSettings
from dsiprep.stages import denoise, motion

GRID = Grid((8, 9, 100), np.diag([2.0, 2, 3, 1]))


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
    return Cache(None).files(nifti, (path,), {"pe": "j"}, path.read_text)


def test_stage_runs_once_and_its_result_is_restored(tmp_path: Path) -> None:
    stage = Counted()

    def run() -> Denoised:
        return Cache(tmp_path / "work").run(denoise, "denoise", stage, source(tmp_path), DenoiseSettings()).value

    first, second = run(), run()
    assert stage.calls == 1
    assert torch.equal(first.dwi.data, second.dwi.data)
    assert torch.equal(first.dwi.data, Counted()().dwi.data)
    np.testing.assert_array_equal(first.dwi.bvecs, second.dwi.bvecs)
    assert second.rank is None
    assert second.method == "dwidenoise"
    assert second.dwi.grid.matches(GRID)
    assert second.noise is not None
    assert second.noise.grid.shape == GRID.shape


@pytest.mark.parametrize(
    "change", ["settings", "stage", "contents"], ids=["another setting", "another stage", "another input file"]
)
def test_key_depends_on_settings_stage_and_input_contents(tmp_path: Path, change: str) -> None:
    cache = Cache(tmp_path / "work")
    before = cache.run(denoise, "denoise", Counted(), source(tmp_path), DenoiseSettings())
    after = cache.run(
        motion if change == "stage" else denoise,
        "denoise",
        Counted(),
        source(tmp_path, "other" if change == "contents" else "input"),
        DenoiseSettings(window=7 if change == "settings" else 0),
    )
    assert before.key != after.key


def test_key_of_a_stage_depends_on_upstream_settings_only(tmp_path: Path) -> None:
    def lineage(denoising: DenoiseSettings, moving: MotionSettings) -> tuple[str, str]:
        cache = Cache(tmp_path / "work")
        first = cache.run(denoise, "denoise", Counted(), source(tmp_path), denoising)
        return first.key, cache.run(motion, "motion", Counted(), first, moving).key

    base = lineage(DenoiseSettings(), MotionSettings())
    other_motion = lineage(DenoiseSettings(), MotionSettings(iters=1))
    other_denoising = lineage(DenoiseSettings(window=5), MotionSettings())
    assert base[0] == other_motion[0]
    assert base[1] != other_motion[1]
    assert base[0] != other_denoising[0]
    assert base[1] != other_denoising[1]


def test_interrupted_write_leaves_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    stage = Counted()
    with monkeypatch.context() as patched:
        patched.setattr("dsiprep.cache.Path.rename", killed)
        with pytest.raises(KeyboardInterrupt):
            Cache(tmp_path / "work").run(denoise, "denoise", stage, DenoiseSettings())
    assert not list((tmp_path / "work").iterdir())
    Cache(tmp_path / "work").run(denoise, "denoise", stage, DenoiseSettings())
    assert stage.calls == 2


def test_tables_nan_and_empty_arrays_are_restored(tmp_path: Path) -> None:
    volume = Volume(torch.zeros(GRID.shape), GRID)
    result = Motion(
        transforms=np.tile(np.eye(4), (30, 1, 1)), volumes=np.arange(30), dwiref=volume, mask=volume,
        r2=np.full(30, np.nan), xcorr=np.zeros(0), slice_z=np.random.default_rng(0).normal(size=(30, 100)),
        slice_axis=2, trace=[{"iter_num": 1, "shiftX": 0.1}], model="3dSHORE", notes=("a", "b"),
    )  # fmt: skip
    back = Cache(tmp_path).run(motion, "motion", lambda: result).value
    assert np.isnan(back.r2).all()
    assert back.xcorr.shape == (0,)
    assert back.notes == ("a", "b")
    np.testing.assert_array_equal(back.slice_z, result.slice_z)
    assert back.trace == result.trace
    assert back.volumes.dtype == result.volumes.dtype


def test_images_with_zeros_are_restored_from_their_other_voxels(tmp_path: Path) -> None:
    noise = torch.randn(80, 81, 82, generator=torch.Generator().manual_seed(1))
    images = noise, (noise > 1).float(), torch.where(noise > 0.8, noise, 0.0), torch.zeros(80, 81, 82)
    back = Cache(tmp_path).run(motion, "motion", lambda: images).value
    for image, restored in zip(images, back, strict=True):
        assert restored.dtype == image.dtype
        assert torch.equal(restored, image)
    (folder,) = tmp_path.iterdir()
    dense, mask, part, zeros = ((folder / f"result.{n}.npy").stat().st_size for n in range(4))
    assert dense > 4 * noise.numel() > 4 * part
    assert max(mask, zeros) < 200


def test_series_that_is_passed_on_is_stored_once(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    first = cache.run(denoise, "denoise", Counted(), DenoiseSettings())
    second = cache.run(motion, "same", lambda denoised: denoised.dwi, first)
    third = cache.run(motion, "changed", lambda denoised: denoised.dwi.with_data(denoised.dwi.data.mul_(2)), first)
    stored, same, changed = (
        next(tmp_path.glob(pattern))
        for pattern in ("denoise-*/*dwi.data.npy", "same-*/*data.npy", "changed-*/*data.npy")
    )
    assert stored.samefile(same)
    assert not stored.samefile(changed)
    assert torch.equal(second.value.data, first.value.dwi.data)
    assert torch.equal(third.value.data, 2 * first.value.dwi.data)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pages_of_results_on_disk_are_given_back(tmp_path: Path) -> None:
    def mapped() -> int:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
        return 1024 * int(line.split()[1])

    series = torch.ones(2**24)
    back = Cache(tmp_path).run(motion, "motion", lambda: series).value
    total = float(back.sum(dtype=torch.float64))
    before = mapped()
    release_memory()
    assert before - mapped() > 2**25
    assert float(back.sum(dtype=torch.float64)) == total == series.numel()


def test_only_found_raises_for_a_missing_result(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--keep-work"):
        Cache(tmp_path, only_found=True).run(denoise, "denoise", Counted(), DenoiseSettings())


@pytest.mark.parametrize(
    "problem", [OSError("2488800 requested and 256992 written"), OSError(28, "No space left on device")]
)
def test_full_disk_is_reported_and_leaves_no_partial_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: OSError
) -> None:
    def full(*_: object) -> None:
        raise problem

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OutputError, match=r"(?i)no space left.*--work-dir"):
        Cache(tmp_path / "work").run(denoise, "denoise", Counted(), source(tmp_path), DenoiseSettings())
    assert not list((tmp_path / "work").iterdir())
