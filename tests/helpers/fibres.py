"""Where the fibres of a phantom run, at voxels of a finished run, and the peaks that DIPY and MRtrix3 find there."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dipy.core.gradients import gradient_table
from dipy.data import get_sphere
from dipy.direction import peaks_from_model
from dipy.reconst.dti import TensorModel
from dipy.reconst.gqi import GeneralizedQSamplingModel

from dsiprep.io.itk import read_affine

LOW_B = 2500.0  # s/mm², above which the tensor does not describe the signal


@dataclass(frozen=True)
class Fibres:
    """Voxels of the output that hold one fibre, (m, 3), and its direction in the world of the output, (m, 3)."""

    voxels: np.ndarray
    directions: np.ndarray

    def angle(self, vectors: np.ndarray) -> float:
        """Mean angle in degrees between vectors (m, 3) and the fibres, whichever way either points."""
        unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        cosine = np.abs((unit * self.directions).sum(1))
        return float(np.degrees(np.arccos(np.clip(cosine, 0, 1))).mean())


def series(finished: Path) -> Path:
    """The name of the preprocessed series, less its ending."""
    return next((finished / "sub-01" / "dwi").glob("*desc-preproc_dwi.bval")).with_suffix("")


def _acpc_to_head(finished: Path, phantom: Path) -> np.ndarray:
    """ACPC points to the head of the phantom: its T1w, or else the first volume, less that volume's pose."""
    for path in finished.rglob("*from-anat_to-ACPC*.mat"):
        return read_affine(path).matrix
    pose = json.loads((phantom / "truth" / "truth.json").read_text())["head_to_scanner"][0]
    return np.linalg.inv(pose) @ read_affine(next(finished.rglob("*desc-coreg_xfm.txt"))).matrix


def single_fibres(finished: Path, phantom: Path, least: float = 0.6) -> Fibres:
    """Voxels in which more than `least` of all fibres run one way, and which way."""
    image = nib.load(series(finished).with_suffix(".nii.gz"))
    to_head = _acpc_to_head(finished, phantom)
    fibres, shares = (nib.load(phantom / "truth" / f"{name}.nii.gz") for name in ("fibres", "fibre_shares"))
    voxels = np.argwhere(np.ones(image.shape[:3], bool))
    head = nib.affines.apply_affine(to_head @ image.affine, voxels)
    where = np.rint(nib.affines.apply_affine(np.linalg.inv(fibres.affine), head)).astype(int)
    inside = ((where >= 0) & (where < fibres.shape[:3])).all(1)
    voxels, where = voxels[inside], where[inside]
    share = np.asarray(shares.dataobj)[tuple(where.T)]
    single = share.max(-1) > least
    voxels, where, share = voxels[single], where[single], share[single]
    both = np.asarray(fibres.dataobj)[tuple(where.T)].reshape(-1, 2, 3)
    directions = both[np.arange(len(where)), share.argmax(-1)] @ to_head[:3, :3]
    return Fibres(voxels, directions / np.linalg.norm(directions, axis=1, keepdims=True))


def tensor_peaks(signals: np.ndarray, bvals: np.ndarray, bvecs: np.ndarray) -> np.ndarray:
    """First eigenvectors (m, 3) of DIPY's tensor fit to signals (m, n) at low b, in the frame of the b-vectors."""
    low = bvals < LOW_B
    table = gradient_table(bvals[low], bvecs=bvecs[low], b0_threshold=100)
    return TensorModel(table).fit(signals[:, low]).evecs[..., 0]


def gqi_peaks(signals: np.ndarray, bvals: np.ndarray, bvecs: np.ndarray) -> np.ndarray:
    """Largest peaks (m, 3) of DIPY's generalised q-sampling of signals (m, n), in the frame of the b-vectors."""
    model = GeneralizedQSamplingModel(gradient_table(bvals, bvecs=bvecs, b0_threshold=100), sampling_length=1.2)
    sphere = get_sphere(name="repulsion724")
    found = peaks_from_model(model, signals, sphere, 0.5, 25, npeaks=1, return_sh=False)
    return found.peak_dirs[:, 0]


def mrtrix(*arguments: object) -> str:
    """Standard output of an MRtrix3 command; the test is skipped without MRtrix3."""
    if shutil.which("dwi2tensor") is None:
        pytest.skip("MRtrix3 is not installed (apt-get install mrtrix3)")
    run = [str(argument) for argument in (*arguments, "-quiet", "-nthreads", "0")]
    return subprocess.run(run, capture_output=True, text=True, check=True).stdout


def mrtrix_peaks(stem: str, voxels: np.ndarray, gradients: tuple[str, ...], folder: Path) -> np.ndarray:
    """First eigenvectors (m, 3) of dwi2tensor in world RAS+ at voxels of the series `stem`, with these `gradients`."""
    low = ",".join(str(v) for v in np.flatnonzero(np.loadtxt(f"{stem}.bval") < LOW_B))
    low_b, tensor, vectors = (folder / name for name in ("low_b.mif", "tensor.nii", "vectors.nii"))
    mrtrix("mrconvert", f"{stem}.nii.gz", *gradients, "-coord", "3", low, low_b, "-force")
    mrtrix("dwi2tensor", low_b, tensor, "-force")
    mrtrix("tensor2metric", tensor, "-vector", vectors, "-modulate", "none", "-force")
    image = nib.load(vectors)
    to_voxels = np.linalg.inv(image.affine) @ nib.load(f"{stem}.nii.gz").affine
    rows = np.rint(nib.affines.apply_affine(to_voxels, voxels)).astype(int)
    return np.nan_to_num(np.asarray(image.dataobj)[tuple(rows.T)])


def fsl_table(stem: str) -> str:
    """FSL's b-vectors of the series `stem`."""
    return stem.removesuffix("_dwi") + "_fslbvecs.txt"
