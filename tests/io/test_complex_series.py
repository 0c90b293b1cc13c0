"""Complex series: every way in which phase is stored is read alike."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from dsiprep.errors import InputError
from dsiprep.io.bids import read_unit
from dsiprep.io.unit_check import check_unit
from helpers.bids_dataset import AP, LAS, SETTINGS, Dataset

SHAPE = (6, 7, 5)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(tmp_path / "bids", SHAPE)


def acquired() -> np.ndarray:
    rng = np.random.default_rng(4)
    return (1 + 99 * rng.random((*SHAPE, 20))) * np.exp(1j * rng.uniform(-np.pi, np.pi, (*SHAPE, 20)))


def store(dataset: Dataset, name: str, data: np.ndarray) -> None:
    if name.endswith(("mag", "real")):
        dataset.dwi(name, AP, affine=LAS)
    nib.Nifti1Image(data, LAS).to_filename(dataset.root / "sub-01" / "dwi" / f"{name}_dwi.nii.gz")


def read(dataset: Dataset, **options: object) -> tuple[np.ndarray, np.ndarray | None]:
    unit = dataset.unit(**options)
    check_unit(unit, SETTINGS)
    (run,) = read_unit(unit, SETTINGS).runs
    as_file = tuple(None if part is None else np.moveaxis(part.numpy(), 0, -1) for part in (run.data, run.phase))
    assert as_file[0] is not None
    return as_file[0], as_file[1]


@pytest.mark.parametrize(
    ("scale", "offset", "kind"),
    [
        (1.0, 0.0, np.float32),
        (2048 / np.pi, 2048, np.int16),  # Siemens, 0 to 4095
        (4096 / np.pi, 0, np.int16),  # Siemens by dcm2niix, -4096 to 4094
        (1000.0, 0, np.int16),  # GE, thousandths of radians
        (180 / np.pi, 0, np.float32),
    ],
)
def test_phase_in_any_scaling(dataset: Dataset, scale: float, offset: float, kind: type) -> None:
    image = acquired()
    stored = np.angle(image) * scale + offset
    store(dataset, "sub-01_part-mag", np.abs(image).astype(np.float32))
    store(dataset, "sub-01_part-phase", (stored if kind is np.float32 else np.floor(stored)).astype(kind))
    magnitude, phase = read(dataset)
    assert phase is not None
    np.testing.assert_allclose(magnitude, np.abs(image), rtol=1e-5)
    assert np.abs(np.angle(np.exp(1j * (phase - np.angle(image))))).max() < 0.005
    assert read(dataset, ignore=frozenset({"phase"}))[1] is None


def test_real_and_imaginary_part(dataset: Dataset) -> None:
    image = acquired()
    store(dataset, "sub-01_part-real", image.real.astype(np.float32))
    store(dataset, "sub-01_part-imag", image.imag.astype(np.float32))
    magnitude, phase = read(dataset)
    assert phase is not None
    np.testing.assert_allclose(magnitude * np.exp(1j * phase), image, atol=1e-3)
    magnitude, phase = read(dataset, ignore=frozenset({"phase"}))
    np.testing.assert_allclose(magnitude, np.abs(image), rtol=1e-5)
    assert phase is None


def test_parts_that_do_not_fit_are_refused(dataset: Dataset) -> None:
    image = acquired()
    store(dataset, "sub-01_part-mag", np.abs(image).astype(np.float32))
    store(dataset, "sub-01_part-phase", np.angle(image)[..., :7].astype(np.float32))
    with pytest.raises(InputError, match=r"part-phase_dwi.nii.gz: its shape differs .* --ignore phase"):
        check_unit(dataset.unit(), SETTINGS)
    store(dataset, "sub-01_part-phase", (np.angle(image) * 55).astype(np.float32))
    with pytest.raises(InputError, match=r"fit no known range .* --ignore phase"):
        read(dataset)
