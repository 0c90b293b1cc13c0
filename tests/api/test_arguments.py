"""Wrong calls of the library: each is refused with a sentence that says what is wanted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

import dsiprep
from dsiprep import (
    DenoiseSettings,
    InputError,
    MotionSettings,
    ResampleSettings,
    Settings,
    SettingsError,
    align_series,
    correct_pair,
    estimate_motion,
    preprocess,
)
from dsiprep.data.acquisition import Unit

SHAPE, N = (6, 6, 6), 8
AFFINE = np.diag([2.0, 2, 2, 1])
BVALS = np.array([0.0, *[1000.0] * (N - 1)])
BVECS = np.vstack([np.zeros(3), np.tile([1.0, 0, 0], (N - 1, 1))])
DATA = np.ones((*SHAPE, N), np.float32)
UNIT: Any = object.__new__(Unit)


def motion(**changed: Any) -> Any:
    given = {"data": DATA, "affine": AFFINE, "bvals": BVALS, "bvecs": BVECS} | changed
    return estimate_motion(**given)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": "sub-01_dwi.nii.gz"}, r"data is a path, sub-01_dwi.nii.gz; give the array: nibabel.load"),
        ({"data": Path("a.nii")}, r"data is a path, a.nii"),
        ({"data": nib.Nifti1Image(DATA, AFFINE)}, r"data is a Nifti1Image; a NumPy array .*image.get_fdata\(\)"),
        ({"data": DATA.tolist()}, r"data is a list; a NumPy array or a torch tensor is wanted$"),
        ({"data": DATA[..., 0]}, r"data has 3 dimensions; four are wanted"),
        ({"data": DATA * 1j}, r"data is complex; give magnitudes: abs\(data\)"),
        ({"data": 0 * DATA}, r"data is zero everywhere"),
        ({"data": DATA[:0]}, r"data is empty, with shape \(0, 6, 6, 8\)"),
        ({"affine": np.eye(3)}, r"affine has shape \(3, 3\); \(4, 4\) is wanted"),
        ({"affine": np.zeros((4, 4))}, r"affine cannot be inverted"),
        ({"affine": np.array([[2.0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0], [9, 9, 9, 1]])}, r"is it transposed\?"),
        ({"bvals": BVALS[1:]}, r"7 b-values for 8 volumes"),
        ({"bvals": -BVALS}, r"negative"),
        ({"bvecs": BVECS[1:]}, r"bvecs has shape \(7, 3\); \(8, 3\) or \(3, 8\) is wanted"),
        ({"bvecs": 3 * BVECS}, r"the b-vector of volume 1 has length 3 at b = 1000; unit length is wanted"),
        ({"bvecs": BVECS * np.nan}, r"non-finite"),
        ({"phase_encoding": "AP"}, r"phase_encoding is 'AP'; BIDS' PhaseEncodingDirection is wanted.*i, i-, j"),
        ({"phase_encoding": 1}, r"phase_encoding is 1;"),
        (
            {"settings": Settings()},
            r"settings is Settings; MotionSettings is wanted, as in settings=MotionSettings\(\)",
        ),
        ({"mask": np.ones((2, 2, 2))}, r"the mask has shape \(2, 2, 2\), the volumes \(6, 6, 6\)"),
        ({"bvals": BVALS + 500}, r"no volume has b <= 100, the lowest is 500; raise b0_threshold"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_estimate_motion_refuses_wrong_arguments(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        motion(**changed)


def test_align_series_refuses_motion_of_another_series() -> None:
    class Short:
        transforms = np.tile(np.eye(4), (3, 1, 1))

    with pytest.raises(InputError, match="motion has 3 transforms for 8 volumes"):
        align_series(DATA, AFFINE, BVECS, Short())  # type: ignore[arg-type]


def test_correct_pair_refuses_an_anatomical_phase_encoding() -> None:
    with pytest.raises(InputError, match="pe_dir is 'AP'"):
        correct_pair(Path("up.nii"), Path("down.nii"), pe_dir="AP")


def test_preprocess_refuses_settings_without_resolution_at_once() -> None:
    with pytest.raises(SettingsError, match=r"Settings\(resample=ResampleSettings\(resolution=2.0\)\)"):
        preprocess(UNIT, Settings())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MotionSettings(iters=0), r"MotionSettings.iters \(--shoreline-iters\): 0 is too small"),
        (lambda: MotionSettings(iters=2.5), r"2.5 is not a whole number"),  # type: ignore[arg-type]
        (lambda: MotionSettings(tolerance=0), r"a value above 0 is needed"),
        (lambda: MotionSettings(model="SHORE"), r"'SHORE' is not one of auto, 3dSHORE, tensor, none"),
        (lambda: DenoiseSettings(window=4), r"4 is even"),
        (lambda: ResampleSettings(resolution=0.2), r"0.2 mm is too small"),
        (lambda: ResampleSettings(resolution=float("nan")), r"nan is too small"),
        (lambda: ResampleSettings(resolution=25), r"25 is too large; the largest accepted value is 10"),
        (lambda: Settings(motion=Settings()), r"Settings.motion is Settings; MotionSettings\(...\) is wanted"),  # type: ignore[arg-type]
    ],
)
def test_settings_refuse_values_out_of_range(make: Callable[[], object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make()


def test_settings_hold_plain_numbers() -> None:
    assert type(ResampleSettings(resolution=2).resolution) is float
    assert type(MotionSettings(iters=np.int64(3)).iters) is int


def test_public_names_are_listed_and_exist() -> None:
    assert dir(dsiprep) == sorted(dsiprep.__all__)
    assert all(getattr(dsiprep, name) is not None for name in dsiprep.__all__)
    assert set(dsiprep.__all__) == {"__version__", *dsiprep._MODULE_OF}
    assert (Path(dsiprep.__file__).parent / "py.typed").is_file()
