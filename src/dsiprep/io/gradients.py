"""b-values and b-vectors, in and out. The only place that knows FSL's frame.

Inside, b-vectors are unit vectors in world RAS+. FSL writes them along the voxel axes of the image, with the
first one turned around where the affine has a positive determinant. MRtrix writes world RAS+; DSI Studio the
axes of the image turned to L, P, S.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dsiprep.data.grid import Grid
from dsiprep.errors import GradientError
from dsiprep.io.nifti import listed, lps_axes

NORM_TOLERANCE = 0.1


def read_gradients(
    bval: Path, bvec: Path, grid: Grid, n_volumes: int, b0_threshold: float = 100.0, need_b0: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """The b-table of an image.

    Parameters
    ----------
    bval, bvec : Path
        FSL's text files: one row of n, and three rows of n (n rows of three are read too).
    grid : Grid
        Of the image that they belong to.
    n_volumes : int
        Of that image.
    b0_threshold : float
        b-values at or below this (s/mm²) count as b=0.
    need_b0 : bool
        Whether there has to be a b=0.

    Returns
    -------
    bvals : ndarray, (n,)
        s/mm².
    bvecs : ndarray, (n, 3)
        Unit vectors in world RAS+; zero where the file has zero.

    Raises
    ------
    GradientError
        If a file is missing or is no table of numbers, counts do not match, values are impossible, a
        diffusion-weighted volume has no direction, or there is no b=0.
    """
    bvals = read_bvals(bval, n_volumes)
    table = _numbers(Path(bvec))
    if table.shape[0] != 3 and table.shape[1:] == (3,):
        table = table.T
    if table.shape != (3, n_volumes):
        found = f"{table.shape[0]} rows of {table.shape[1]} numbers"
        raise GradientError(
            f"{bvec}: {found}, but {n_volumes} volumes need 3 rows of {n_volumes}; check that image and "
            "b-vectors were made together"
        )
    vectors = _unit(table.T, bvals > b0_threshold, Path(bvec), Path(bval))
    if need_b0:
        require_b0(bvals, b0_threshold, str(bval))
    return bvals, from_fsl(vectors, grid)


def from_fsl(bvecs: np.ndarray, grid: Grid) -> np.ndarray:
    """b-vectors (n, 3) in FSL's convention for images on `grid`, in world RAS+."""
    return np.asarray(bvecs, float) @ _fsl_axes(grid).T


def to_fsl(bvecs: np.ndarray, grid: Grid) -> np.ndarray:
    """The inverse of `from_fsl`."""
    return np.asarray(bvecs, float) @ _fsl_axes(grid)


def read_bvals(bval: Path, n_volumes: int) -> np.ndarray:
    """b-values in s/mm², (n,); errors as `read_gradients`."""
    bvals = _numbers(Path(bval)).ravel()
    if len(bvals) != n_volumes:
        raise GradientError(
            f"{bval}: {len(bvals)} b-values, but the image has {n_volumes} volumes; check that they were "
            "made together (a trace or ADC volume at the end of the series has no b-value)"
        )
    if (bad := np.flatnonzero(~np.isfinite(bvals) | (bvals < 0))).size:
        raise GradientError(f"{bval}: the b-value of {listed(list(bad))} is negative or not a number; correct it")
    return bvals


def require_b0(bvals: np.ndarray, b0_threshold: float, where: str, fixed: bool = False) -> None:
    """Raise a GradientError, naming `where`, if no b-value is at or below `b0_threshold` (s/mm²).

    `fixed` is for programs that have no option --b0-threshold to advise.
    """
    if not (bvals <= b0_threshold).any():
        lowest, limit = float(bvals.min()), f"{'' if fixed else '--b0-threshold '}{b0_threshold:g}"
        remedy = "write 0 for it in that file" if fixed else f"run with --b0-threshold {int(np.ceil(lowest))}"
        raise GradientError(
            f"{where}: no b=0 volume: the lowest b-value is {lowest:g}, above {limit}; if it was meant as b=0, {remedy}"
        )


def write_bvals(path: Path, bvals: np.ndarray) -> None:
    """b-values (n,) in s/mm², FSL's `.bval`."""
    Path(path).write_text(" ".join(f"{b:.8g}" for b in bvals) + "\n")


def write_fsl_bvecs(path: Path, bvecs: np.ndarray, grid: Grid) -> None:
    """b-vectors (n, 3), world RAS+, as FSL's `.bvec` of an image on `grid`."""
    rows = to_fsl(bvecs, grid).T + 0.0  # + 0.0: no -0
    Path(path).write_text("\n".join(" ".join(f"{x:.8f}" for x in row) for row in rows) + "\n")


def write_mrtrix_b(path: Path, bvals: np.ndarray, bvecs: np.ndarray) -> None:
    """b-values (n,) and b-vectors (n, 3), world RAS+, as MRtrix's `.b`: x y z b, one volume per row."""
    rows = (f"{x:.10f} {y:.10f} {z:.10f} {b:.8g}" for (x, y, z), b in zip(bvecs + 0.0, bvals, strict=True))
    Path(path).write_text("\n".join(rows) + "\n")


def write_dsi_studio(path: Path, bvals: np.ndarray, bvecs: np.ndarray, grid: Grid) -> None:
    """b-values (n,) and b-vectors (n, 3), world RAS+, as DSI Studio's `b_table.txt` of an image on `grid`.

    DSI Studio turns images to L, P, S when it reads them; its b-vectors lie along those axes: b x y z, one
    volume per row.
    """
    order, flipped = lps_axes(grid)
    axes = _directions(grid)[:, list(order)] * np.where(flipped, -1.0, 1.0)
    rows = (
        f"{round(float(b)):d} {x:.6f} {y:.6f} {z:.6f}"
        for (x, y, z), b in zip(np.asarray(bvecs, float) @ axes + 0.0, bvals, strict=True)
    )
    Path(path).write_text("\n".join(rows) + "\n")


def _directions(grid: Grid) -> np.ndarray:
    """The orthonormal axes nearest to the voxel axes, one per column; handedness is kept."""
    u, _, vt = np.linalg.svd(grid.directions)
    return u @ vt


def _fsl_axes(grid: Grid) -> np.ndarray:
    """FSL's axes in world RAS+, one per column: world = axes @ fsl."""
    axes = _directions(grid)
    if np.linalg.det(grid.affine[:3, :3]) > 0:
        axes = axes * np.array([-1.0, 1.0, 1.0])
    return axes


def _numbers(path: Path) -> np.ndarray:
    try:
        lines = [line.replace(",", " ").split() for line in path.read_text().splitlines()]
        rows = [[float(word) for word in words] for words in lines if words]
    except OSError as problem:
        raise GradientError(
            f"{path}: {(problem.strerror or 'cannot be read').lower()}; every diffusion-weighted series "
            "needs a .bval and a .bvec"
        ) from None
    except ValueError as problem:
        raise GradientError(f"{path}: not a table of numbers ({problem}); convert the series again") from None
    if not rows or len({len(row) for row in rows}) != 1:
        found = "empty" if not rows else "rows of different length"
        raise GradientError(f"{path}: {found}, but a table of numbers is wanted; convert the series again")
    return np.array(rows)


def _unit(vectors: np.ndarray, weighted: np.ndarray, bvec: Path, bval: Path) -> np.ndarray:
    """Normalised rows; those of b=0 volumes become zero if they are no direction."""
    if (bad := np.flatnonzero(~np.isfinite(vectors).all(1))).size:
        raise GradientError(f"{bvec}: the b-vector of {listed(list(bad))} is not a number; write 0 0 0 for b=0")
    norm = np.linalg.norm(vectors, axis=1)
    if (bad := np.flatnonzero(weighted & (norm < 1e-6))).size:
        raise GradientError(
            f"{bvec}: the b-vector of {listed(list(bad))} is zero although {bval.name} says b > 0; correct "
            "the table, or remove those volumes (trace images have no direction)"
        )
    off = np.abs(norm - 1) > NORM_TOLERANCE
    if (bad := np.flatnonzero(weighted & off)).size:
        raise GradientError(
            f"{bvec}: the b-vector of {listed(list(bad))} has length {norm[bad[0]]:.3g}, but 1 is wanted; "
            "if the table scales b-vectors instead of b-values, write each volume's own b-value"
        )
    return np.where(off[:, None], 0.0, vectors / np.where(norm > 0, norm, 1)[:, None])
