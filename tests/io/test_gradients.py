"""Reading b-tables, and writing them in three formats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dipy.core.gradients import gradient_table, reorient_vectors
from dipy.io import read_bvals_bvecs
from scipy.spatial.transform import Rotation

from dsiprep.data.grid import Grid
from dsiprep.errors import GradientError
from dsiprep.io.gradients import (
    read_gradients,
    write_bvals,
    write_dsi_studio,
    write_fsl_bvecs,
    write_image_bvecs,
    write_mrtrix_b,
)
from dsiprep.io.nifti import to_lps

# voxel axes, and the frame of FSL's b-vectors for them: the first axis is reversed if det > 0
FRAMES = {
    "RAS": "LAS",
    "LAS": "LAS",
    "LPS": "RPS",
    "RPS": "RPS",
    "PSR": "PSR",
    "ASR": "PSR",
    "SPL": "SPL",
    "SPR": "IPR",
}
WORLD = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}


def grid_of(codes: str, rotation: np.ndarray | None = None) -> Grid:
    """An anisotropic grid with these voxel axes, optionally rotated."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, (code, size) in enumerate(zip(codes, (1.5, 2.0, 3.0), strict=True)):
        world, sign = WORLD[code]
        affine[world, axis] = sign * size
    if rotation is not None:
        affine[:3, :3] = rotation @ affine[:3, :3]
    affine[:3, 3] = (10, -20, 30)
    return Grid((5, 6, 7), affine)


def table(count: int = 20) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    bvecs = rng.normal(size=(count, 3))
    bvecs /= np.linalg.norm(bvecs, axis=1, keepdims=True)
    bvals = np.linspace(200, 4985, count).round()
    bvals[0], bvecs[0] = 0, 0
    return bvals, bvecs


def test_first_axis_is_reversed_for_positive_determinant() -> None:
    for codes, frame in FRAMES.items():
        is_reversed = np.linalg.det(grid_of(codes).affine[:3, :3]) > 0
        assert (codes[0] != frame[0]) == is_reversed
        assert codes[1:] == frame[1:]


@pytest.mark.parametrize("codes", FRAMES)
def test_bvecs_agree_with_dipy(codes: str, tmp_path: Path) -> None:
    """DIPY takes components along the axes of the image; FSL's are along those of FRAMES."""
    bvals, bvecs = table()
    write_bvals(tmp_path / "a.bval", bvals)
    for write_table, axes in ((write_image_bvecs, codes), (write_fsl_bvecs, FRAMES[codes])):
        write_table(tmp_path / "a.bvec", bvecs, grid_of(codes))
        read_bvals, read_bvecs = read_bvals_bvecs(str(tmp_path / "a.bval"), str(tmp_path / "a.bvec"))
        np.testing.assert_allclose(read_bvecs, reorient_vectors(bvecs, "RAS", axes, axis=1), atol=1e-7)
        np.testing.assert_array_equal(read_bvals, bvals)
        assert gradient_table(read_bvals, bvecs=read_bvecs, b0_threshold=100).b0s_mask.sum() == 1


def test_qsirecon_turns_bvec_into_the_tables_of_mrtrix_and_dsi_studio(tmp_path: Path) -> None:
    """QSIRecon multiplies `.bvec` by -1 -1 1 for MRtrix and copies it for DSI Studio; the image is LPS+."""
    bvals, bvecs = table()
    grid = grid_of("LPS")
    write_image_bvecs(tmp_path / "a.bvec", bvecs, grid)
    write_mrtrix_b(tmp_path / "a.b", bvals, bvecs)
    write_dsi_studio(tmp_path / "a.txt", bvals, bvecs, grid)
    rows = np.loadtxt(tmp_path / "a.bvec").T
    np.testing.assert_allclose(np.c_[rows, bvals] * [-1, -1, 1, 1], np.loadtxt(tmp_path / "a.b"), atol=1e-7)
    np.testing.assert_allclose(np.c_[bvals, rows], np.loadtxt(tmp_path / "a.txt"), atol=1e-6)


@pytest.mark.parametrize("codes", FRAMES)
@pytest.mark.parametrize("oblique", [False, True])
def test_fsl_mrtrix_and_dsi_studio_formats_agree(codes: str, oblique: bool, tmp_path: Path) -> None:
    rotation = Rotation.from_euler("xyz", (12, -20, 8), degrees=True).as_matrix() if oblique else None
    bvals, bvecs = table()
    grid = grid_of(codes, rotation)
    write_bvals(tmp_path / "a.bval", bvals)
    write_fsl_bvecs(tmp_path / "a.bvec", bvecs, grid)
    write_mrtrix_b(tmp_path / "a.b", bvals, bvecs)
    write_dsi_studio(tmp_path / "a.txt", bvals, bvecs, grid)

    read_bvals, world = read_gradients(tmp_path / "a.bval", tmp_path / "a.bvec", grid, len(bvals))
    np.testing.assert_allclose(world, bvecs, atol=1e-7)
    np.testing.assert_allclose(read_bvals, bvals)
    mrtrix = np.loadtxt(tmp_path / "a.b")
    np.testing.assert_allclose(mrtrix[:, :3], bvecs, atol=1e-9)
    np.testing.assert_allclose(mrtrix[:, 3], bvals)
    # b-vectors of DSI Studio refer to the voxel axes of the image reoriented to L, P, S
    lps = to_lps(np.zeros(grid.shape), grid)[1]
    studio = np.loadtxt(tmp_path / "a.txt")
    np.testing.assert_allclose(studio[:, 1:] @ lps.directions.T, bvecs, atol=2e-6)
    np.testing.assert_array_equal(studio[:, 0], bvals)
    if not oblique:
        np.testing.assert_allclose(studio[:, 1:], mrtrix[:, :3] * (-1, -1, 1), atol=2e-6)


def test_dsi_studio_b_table_text(tmp_path: Path) -> None:
    write_dsi_studio(tmp_path / "t", np.array([0.0, 994.9999]), np.array([[0, 0, 0], [1.0, 0, 0]]), grid_of("LPS"))
    assert (tmp_path / "t").read_text() == "0 0.000000 0.000000 0.000000\n995 -1.000000 0.000000 0.000000\n"


def test_fsl_bvecs_are_invariant_to_left_right_storage_order(tmp_path: Path) -> None:
    """FSL's frame is defined to be independent of left-right flips of the stored image."""
    _, bvecs = table()
    for codes in ("RAS", "LAS"):
        write_fsl_bvecs(tmp_path / codes, bvecs, grid_of(codes))
    assert (tmp_path / "RAS").read_text() == (tmp_path / "LAS").read_text()


def write(tmp_path: Path, bvals: np.ndarray, bvecs: np.ndarray) -> tuple[Path, Path]:
    np.savetxt(tmp_path / "a.bval", bvals[None], fmt="%g")
    np.savetxt(tmp_path / "a.bvec", bvecs, fmt="%.6f")
    return tmp_path / "a.bval", tmp_path / "a.bvec"


def test_transposed_and_rounded_bvecs_are_read(tmp_path: Path) -> None:
    bvals, bvecs = table()
    grid = grid_of("LAS")
    files = write(tmp_path, bvals, bvecs.T)
    expected = read_gradients(*files, grid, 20)[1]
    files = write(tmp_path, bvals, np.round(bvecs, 2))
    found = read_gradients(*files, grid, 20)[1]
    np.testing.assert_allclose(found, expected, atol=0.01)
    np.testing.assert_allclose(np.linalg.norm(found[1:], axis=1), 1, atol=1e-12)


def test_square_bvec_file_is_read_in_fsl_order(tmp_path: Path) -> None:
    vectors = np.array([[0, 0, 0], [0, 1.0, 0], [0.6, 0, 0.8]])
    files = write(tmp_path, np.array([0, 1000.0, 1000]), vectors.T)
    np.testing.assert_allclose(read_gradients(*files, grid_of("LAS"), 3)[1], vectors * (-1, 1, 1))


def invalid_table(**changes: object) -> tuple[np.ndarray, np.ndarray, int, float]:
    bvals, bvecs = table()
    if "bval" in changes:
        bvals[3:5] = changes["bval"]
    if "bvec" in changes:
        bvecs[[3, 7]] = changes["bvec"]
    if changes.get("no_b0"):
        bvals[0], bvecs[0] = 150, bvecs[1]
    return bvals, bvecs, int(str(changes.get("volumes", 20))), 100.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bvec": 0.0}, r"a\.bvec.*volumes 3, 7 .*zero although b > 0 in a\.bval"),
        ({"bvec": np.nan}, r"a\.bvec.*volumes 3, 7 .*not a finite number"),
        ({"bvec": 0.4}, r"a\.bvec.*length 0\.693"),
        ({"bval": np.nan}, r"a\.bval.*volumes 3, 4 .*negative or not a number"),
        ({"bval": -5}, r"a\.bval.*volumes 3, 4 .*negative or not a number"),
        ({"volumes": 21}, r"a\.bval.*20 b-values, but the image has 21 volumes"),
        ({"no_b0": True}, r"a\.bval.*lowest b-value is 150.*--b0-threshold 150"),
    ],
)
def test_invalid_tables_raise(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    bvals, bvecs, volumes, threshold = invalid_table(**changes)
    files = write(tmp_path, bvals, bvecs.T)
    with pytest.raises(GradientError, match=message):
        read_gradients(*files, grid_of("RAS"), volumes, threshold)


def test_unreadable_files_raise(tmp_path: Path) -> None:
    bvals, bvecs = table()
    bval, bvec = write(tmp_path, bvals, bvecs.T)
    grid = grid_of("RAS")
    with pytest.raises(GradientError, match=r"none\.bval: there is no such file"):
        read_gradients(tmp_path / "none.bval", bvec, grid, 20)
    with pytest.raises(GradientError, match=r"none\.bvec: there is no such file"):
        read_gradients(bval, tmp_path / "none.bvec", grid, 20)
    bvec.write_text("0 0 0 1\n1 0 x 0\n0 1 0 0\n")
    with pytest.raises(GradientError, match="not a table of numbers"):
        read_gradients(bval, bvec, grid, 20)
    bvec.write_text("0 0 0 1\n1 0 0\n0 1 0 0\n")
    with pytest.raises(GradientError, match="rows of different length"):
        read_gradients(bval, bvec, grid, 20)
    bvec.write_text("")
    with pytest.raises(GradientError, match="empty"):
        read_gradients(bval, bvec, grid, 20)
    np.savetxt(bvec, bvecs[:19].T)
    with pytest.raises(GradientError, match="3 rows of 19 numbers, but 20 volumes"):
        read_gradients(bval, bvec, grid, 20)


def test_b0_volumes_may_have_any_vector(tmp_path: Path) -> None:
    bvals, bvecs = table()
    bvecs[0] = (0.3, 0, 0)
    files = write(tmp_path, bvals, bvecs.T)
    assert (read_gradients(*files, grid_of("RAS"), 20)[1][0] == 0).all()
