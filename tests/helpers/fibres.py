"""Where the fibres of a phantom run, at voxels of a finished run: what other programs' peaks are held against."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from dsiprep.io.itk import read_affine


@dataclass(frozen=True)
class Fibres:
    """Voxels of the output that hold one fibre, (m, 3), and its direction in the world of the output, (m, 3)."""

    voxels: np.ndarray
    directions: np.ndarray

    def angle(self, vectors: np.ndarray) -> float:
        """Median angle in degrees between vectors (m, 3) and the fibres, whichever way either points."""
        unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        cosine = np.abs((unit * self.directions).sum(1))
        return float(np.degrees(np.arccos(np.clip(np.median(cosine), 0, 1))))


def series(finished: Path) -> Path:
    """The name of the preprocessed series, less its ending."""
    return next((finished / "sub-01" / "dwi").glob("*desc-preproc_dwi.bval")).with_suffix("")


def single_fibres(finished: Path, phantom: Path) -> Fibres:
    """Voxels in which more than 0.6 of all fibres run one way, and which way."""
    image = nib.load(series(finished).with_suffix(".nii.gz"))
    to_anat = read_affine(next(finished.rglob("*from-anat_to-ACPC*.mat"))).matrix
    fibres, shares = (nib.load(phantom / "truth" / f"{name}.nii.gz") for name in ("fibres", "fibre_shares"))
    voxels = np.argwhere(np.ones(image.shape[:3], bool))
    head = nib.affines.apply_affine(to_anat @ image.affine, voxels)
    where = np.rint(nib.affines.apply_affine(np.linalg.inv(fibres.affine), head)).astype(int)
    inside = ((where >= 0) & (where < fibres.shape[:3])).all(1)
    voxels, where = voxels[inside], where[inside]
    share = np.asarray(shares.dataobj)[tuple(where.T)]
    single = share.max(-1) > 0.6
    voxels, where, share = voxels[single], where[single], share[single]
    both = np.asarray(fibres.dataobj)[tuple(where.T)].reshape(-1, 2, 3)
    directions = both[np.arange(len(where)), share.argmax(-1)] @ to_anat[:3, :3]
    return Fibres(voxels, directions / np.linalg.norm(directions, axis=1, keepdims=True))
