"""Read and write b-values and b-vectors; the frames of b-vectors in files are confined to this module.

In memory, b-vectors are unit vectors in world RAS+. With A the orthonormal axes of the image in world RAS+, one per
column, a b-vector g is written as

- A' g: along the voxel axes, no sign changed. DIPY and AMICO take b-vectors so, and QSIPrep writes its `.bvec` so;
- S A' g, S = diag(-1, 1, 1) if det A > 0, else the identity: FSL's convention, which BIDS prescribes for raw data;
- g: MRtrix's `.b`;
- L' g, L the axes of the image reoriented to L, P, S: DSI Studio.

For LPS+ images det A > 0, so the first two differ by the sign of x: each read as the other is mirrored left-right.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid
from dsiprep.errors import GradientError
from dsiprep.io.b_tables import read_b_table
from dsiprep.io.nifti import lps_axes

# Frames of written tables and the programs that read them, as sidecars state them
IMAGE_AXES = {
    "Frame": "axes i, j, k of the image, no sign changed, as in the .bvec of QSIPrep",
    "ReadBy": "QSIRecon, DIPY, AMICO",
}
FSL_FRAME = {
    "Frame": "FSL: axes i, j, k of the image, i negated if the determinant of its affine is positive",
    "ReadBy": "FSL (dtifit -r, bvecs of bedpostx), MRtrix3 (-fslgrad)",
}
MRTRIX_FRAME = {"Frame": "world RAS+; one row of x y z b per volume", "ReadBy": "MRtrix3 (-grad)"}
DSI_STUDIO_FRAME = {
    "Frame": "axes of the image reoriented to L, P, S; one row of b x y z per volume",
    "ReadBy": "DSI Studio (--b_table)",
}


def read_gradients(
    bval: Path, bvec: Path, grid: Grid, n_volumes: int, b0_threshold: float = 100.0, need_b0: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Read the b-table of an image.

    Parameters
    ----------
    bval, bvec : Path
        FSL's text files, as BIDS prescribes for raw data: one row of n values, and three rows of n (n rows of three
        are also accepted) in FSL's convention. The `.bvec` of preprocessed series is along the image axes instead.
    grid : Grid
        Grid of the image.
    n_volumes : int
        Number of volumes of the image.
    b0_threshold : float
        b-values at or below this (s/mm²) count as b=0.
    need_b0 : bool
        Whether a b=0 volume is required.

    Returns
    -------
    bvals : ndarray, (n,)
        s/mm².
    bvecs : ndarray, (n, 3)
        Unit vectors in world RAS+; zero for b=0 volumes whose vector is not of unit length.

    Raises
    ------
    GradientError
        If a file is missing or not a table of numbers, counts do not match, values are invalid, a diffusion-weighted
        volume has no direction, or a required b=0 volume is missing.
    """
    table = read_b_table(Path(bval), Path(bvec), n_volumes, b0_threshold)
    if need_b0:
        require_b0(table.bvals, b0_threshold, str(bval))
    return table.bvals, from_fsl(table.vectors, grid)


def from_fsl(bvecs: np.ndarray, grid: Grid) -> np.ndarray:
    """Convert b-vectors (n, 3) from FSL's convention for images on `grid` to world RAS+."""
    return np.asarray(bvecs, float) @ fsl_axes(grid).T


def to_fsl(bvecs: np.ndarray, grid: Grid) -> np.ndarray:
    """Convert b-vectors (n, 3) from world RAS+ to FSL's convention, the inverse of `from_fsl`."""
    return np.asarray(bvecs, float) @ fsl_axes(grid)


def require_b0(bvals: np.ndarray, b0_threshold: float, where: str, fixed: bool = False) -> None:
    """Raise a GradientError, naming `where`, if no b-value is at or below `b0_threshold` (s/mm²).

    `fixed` is for programs without the option --b0-threshold, which the message then does not suggest.
    """
    if not (bvals <= b0_threshold).any():
        lowest, limit = float(bvals.min()), f"{'' if fixed else '--b0-threshold '}{b0_threshold:g}"
        remedy = "write 0 for it in that file" if fixed else f"run with --b0-threshold {int(np.ceil(lowest))}"
        raise GradientError(
            f"{where}: no b=0 volume: the lowest b-value is {lowest:g}, above {limit}; if it is meant as b=0, {remedy}"
        )


def write_bvals(path: Path, bvals: np.ndarray) -> None:
    """Write b-values (n,) in s/mm² as FSL's `.bval`."""
    Path(path).write_text(" ".join(f"{b:.8g}" for b in bvals) + "\n")


def write_fsl_bvecs(path: Path, bvecs: np.ndarray, grid: Grid) -> None:
    """Write b-vectors (n, 3) in world RAS+ for an image on `grid` in FSL's convention: three rows of n."""
    _write_rows(path, to_fsl(bvecs, grid))


def write_image_bvecs(path: Path, bvecs: np.ndarray, grid: Grid) -> None:
    """Write b-vectors (n, 3) in world RAS+ as components along the axes of an image on `grid`: three rows of n.

    This is the `.bvec` that QSIPrep writes and QSIRecon, DIPY and AMICO read. It differs from `write_fsl_bvecs` in the
    sign of x if the affine has a positive determinant.
    """
    _write_rows(path, np.asarray(bvecs, float) @ _directions(grid))


def _write_rows(path: Path, vectors: np.ndarray) -> None:
    rows = vectors.T + 0.0  # + 0.0 turns -0 into 0
    Path(path).write_text("\n".join(" ".join(f"{x:.8f}" for x in row) for row in rows) + "\n")


def write_mrtrix_b(path: Path, bvals: np.ndarray, bvecs: np.ndarray) -> None:
    """Write b-values (n,) and b-vectors (n, 3) in world RAS+ as MRtrix's `.b`: x y z b, one volume per row."""
    rows = (f"{x:.10f} {y:.10f} {z:.10f} {b:.8g}" for (x, y, z), b in zip(bvecs + 0.0, bvals, strict=True))
    Path(path).write_text("\n".join(rows) + "\n")


def write_dsi_studio(path: Path, bvals: np.ndarray, bvecs: np.ndarray, grid: Grid) -> None:
    """Write b-values (n,) and b-vectors (n, 3) in world RAS+ as DSI Studio's `b_table.txt` for an image on `grid`.

    Each row is b x y z of one volume. DSI Studio reorients images to L, P, S on reading, and its b-vectors refer to
    these axes.
    """
    order, flipped = lps_axes(grid)
    axes = _directions(grid)[:, list(order)] * np.where(flipped, -1.0, 1.0)
    rows = (
        f"{round(float(b)):d} {x:.6f} {y:.6f} {z:.6f}"
        for (x, y, z), b in zip(np.asarray(bvecs, float) @ axes + 0.0, bvals, strict=True)
    )
    Path(path).write_text("\n".join(rows) + "\n")


def write_every_frame(stem: Path, dwi: DWI) -> dict[str, dict[str, str]]:
    """Write the gradient tables of a series; their frames and readers by file name, for the sidecar.

    FSL's table has a suffix of its own, so that no query for `.bvec`, or for the suffix `dwi`, matches two files.
    """
    bval, bvec, b, b_table = (stem.with_name(stem.name + end) for end in (".bval", ".bvec", ".b", ".b_table.txt"))
    fsl = stem.with_name(f"{stem.name.rpartition('_')[0]}_fslbvecs.txt")
    write_bvals(bval, dwi.bvals)
    write_image_bvecs(bvec, dwi.bvecs, dwi.grid)
    write_fsl_bvecs(fsl, dwi.bvecs, dwi.grid)
    write_mrtrix_b(b, dwi.bvals, dwi.bvecs)
    write_dsi_studio(b_table, dwi.bvals, dwi.bvecs, dwi.grid)
    return {bvec.name: IMAGE_AXES, fsl.name: FSL_FRAME, b.name: MRTRIX_FRAME, b_table.name: DSI_STUDIO_FRAME}


def _directions(grid: Grid) -> np.ndarray:
    """The orthonormal axes closest to the voxel axes, one per column, with their handedness preserved."""
    u, _, vt = np.linalg.svd(grid.directions)
    return u @ vt


def fsl_axes(grid: Grid) -> np.ndarray:
    """FSL's axes in world RAS+, one per column: world = axes @ fsl."""
    axes = _directions(grid)
    if np.linalg.det(grid.affine[:3, :3]) > 0:
        axes = axes * np.array([-1.0, 1.0, 1.0])
    return axes
