"""Other programs read the gradient tables of phantoms scanned in several orientations and find the fibres.

The phantoms have no noise, motion or distortion, so that only frames can be wrong. The mean error of DIPY's peaks
(generalised q-sampling, GQI) is 3.8 degrees; with a `.bvec` in FSL's convention, mirrored left-right, it is 36.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dipy.io import read_bvals_bvecs

from dsiprep import MotionSettings, ResampleSettings, Settings, find_units, preprocess
from dsiprep.io import derivatives
from dsiprep.phantom import PhantomSettings, make_phantom
from dsiprep.settings import AnatomySettings, DenoiseSettings
from helpers.fibres import Fibres, fsl_table, gqi_peaks, mrtrix_peaks, series, single_fibres, tensor_peaks

PLAIN = Settings(
    denoise=DenoiseSettings(method="none"),
    motion=MotionSettings(method="none"),
    anatomy=AnatomySettings(modality="none"),
    resample=ResampleSettings(resolution=5.0),
)
MAX_MEAN_ANGLE = 6.0  # degrees
FLIPS = np.array([[-1.0, 1, 1], [1, -1, 1], [1, 1, -1]])


@dataclass(frozen=True)
class Run:
    """The preprocessed series `stem`, its fibres, and the axes of its image in world RAS+, one per column."""

    stem: str
    fibres: Fibres
    axes: np.ndarray

    def signals(self) -> np.ndarray:
        return np.asarray(nib.load(f"{self.stem}.nii.gz").dataobj)[tuple(self.fibres.voxels.T)]


@pytest.fixture(scope="module", params=["RAS", "oblique"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    settings = PhantomSettings(
        scheme="dsi257", resolution=5.0, t1w_resolution=4.0, moved=0.0, max_motion=0.0, distortion=0.0, snr=0.0,
        orientation=request.param, ideal=False, seed=3,
    )  # fmt: skip
    phantom = make_phantom(tmp_path_factory.mktemp("phantom"), settings)
    (unit,) = find_units(phantom / "bids", PLAIN, ignore=frozenset({"fieldmaps"}))
    out = tmp_path_factory.mktemp("out")
    derivatives.write_unit(preprocess(unit, PLAIN), out, None)
    affine = nib.load(series(out).with_suffix(".nii.gz")).affine[:3, :3]
    return Run(str(series(out)), single_fibres(out, phantom), affine / np.linalg.norm(affine, axis=0))


@pytest.mark.parametrize("peaks", [tensor_peaks, gqi_peaks])
def test_dipy_finds_the_fibres_with_bvec_as_written(run: Run, peaks: Callable[..., np.ndarray]) -> None:
    bvals, bvecs = read_bvals_bvecs(f"{run.stem}.bval", f"{run.stem}.bvec")
    signals = run.signals()
    assert len(signals) > 1000
    error = run.fibres.angle(peaks(signals, bvals, bvecs) @ run.axes.T)
    flipped = [run.fibres.angle(peaks(signals, bvals, bvecs * flip) @ run.axes.T) for flip in FLIPS]
    assert error < MAX_MEAN_ANGLE
    assert min(flipped) > 2 * error


def test_fsl_table_is_mirrored_for_dipy(run: Run) -> None:
    """The two tables must not be confused: DIPY finds other fibres with FSL's."""
    bvals, bvecs = read_bvals_bvecs(f"{run.stem}.bval", f"{run.stem}.bvec")
    fsl = np.loadtxt(fsl_table(run.stem)).T
    np.testing.assert_allclose(fsl, bvecs * [-1, 1, 1], atol=1e-7)
    assert run.fibres.angle(tensor_peaks(run.signals(), bvals, fsl) @ run.axes.T) > 3 * MAX_MEAN_ANGLE


def test_qsirecon_computes_the_tables_that_are_written(run: Run) -> None:
    """QSIRecon makes `.b` from `.bvec` by the signs -1 -1 1, and DSI Studio's b-table from its unchanged rows."""
    bvals, rows = np.loadtxt(f"{run.stem}.bval"), np.loadtxt(f"{run.stem}.bvec").T
    np.testing.assert_allclose(np.c_[rows, bvals] * [-1, -1, 1, 1], np.loadtxt(f"{run.stem}.b"), atol=1e-7)
    np.testing.assert_allclose(rows, np.loadtxt(f"{run.stem}.b_table.txt")[:, 1:], atol=1e-6)


@pytest.mark.parametrize("option", ["-grad", "-fslgrad"])
def test_mrtrix_finds_the_fibres(run: Run, option: str, tmp_path: Path) -> None:
    files = {"-grad": (f"{run.stem}.b",), "-fslgrad": (fsl_table(run.stem), f"{run.stem}.bval")}[option]
    assert run.fibres.angle(mrtrix_peaks(run.stem, run.fibres.voxels, (option, *files), tmp_path)) < MAX_MEAN_ANGLE
