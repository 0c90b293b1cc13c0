"""Warps and linear transforms of FreeSurfer and SynthMorph compared with surfa, which has the same developers.

surfa 0.6.3 agrees in everything tested here. Its reader calls a NumPy function that NumPy 2.3 removed and that is
restored below. It always interprets a 4-D warp without intent code as voxel displacements, so these files are compared
with the original values.
"""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from dsiprep.data.grid import Grid
from dsiprep.data.transform import DisplacementField
from dsiprep.errors import InputError, OutputError
from dsiprep.io.freesurfer import LAYOUTS, is_mgh, read_lta, read_warp, write_warp
from dsiprep.ops.image.affine import rigid_matrix
from dsiprep.ops.image.filters import gaussian
from helpers.grids import make_grid

surfa = pytest.importorskip("surfa", reason="surfa is the independent reader of FreeSurfer's formats")

FIXED, MOVING = (14, 11, 9), (10, 13, 12)
TILT = rigid_matrix(np.array([0.1, -0.15, 0.2, 4, -6, 3]))


@pytest.fixture(autouse=True)
def restored_fromstring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore `np.fromstring` for binary data, which surfa requires."""
    monkeypatch.setattr(np, "fromstring", lambda content, dtype: np.frombuffer(content, dtype).copy())


def moving_grid() -> Grid:
    grid = make_grid("PSR", MOVING, (2.2, 1.9, 2.6))
    return Grid(MOVING, TILT @ grid.affine)


def displacement(grid: Grid, seed: int = 0, size: float = 6.0) -> np.ndarray:
    """Smooth displacement, mm RAS, (3, i, j, k)."""
    noise = torch.from_numpy(np.random.default_rng(seed).normal(size=(3, *grid.shape)).astype(np.float32))
    smooth = gaussian(noise, 2.0).numpy()
    return smooth * (size / np.abs(smooth).max())


def points_of(grid: Grid) -> np.ndarray:
    return np.moveaxis(grid.to_world(np.moveaxis(np.indices(grid.shape), 0, -1)), -1, 0)


def geometry(grid: Grid) -> surfa.ImageGeometry:
    return surfa.ImageGeometry(shape=grid.shape, vox2world=grid.affine)


def warp_of_surfa(grid: Grid, moving: Grid, u: np.ndarray) -> surfa.Warp:
    data = np.moveaxis(u, 0, -1).astype(np.float32)
    return surfa.Warp(data, geometry(moving), geometry(grid), surfa.Warp.Format.disp_ras)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mgz_warps_of_all_layouts(tmp_path: Path, orientation: str, layout: str) -> None:
    """The files have version 769, which nibabel rejects."""
    grid, moving = make_grid(orientation, FIXED, (1.7, 2.3, 3.1)), moving_grid()
    u = displacement(grid)
    path = tmp_path / "warp.mgz"
    warp_of_surfa(grid, moving, u).convert(LAYOUTS.index(layout)).save(str(path))
    with pytest.raises(nib.spatialimages.HeaderDataError):
        nib.load(path)
    assert is_mgh(path)
    found = read_warp(path)
    assert found.layout == layout
    np.testing.assert_allclose(found.field.data.numpy(), u, atol=1e-3)
    assert found.field.grid.matches(grid)
    assert found.moving is not None
    assert found.moving.matches(moving)


def test_nifti_warps_with_header_extension(tmp_path: Path, orientation: str) -> None:
    grid, moving = make_grid(orientation, FIXED, (1.7, 2.3, 3.1)), moving_grid()
    u = displacement(grid)
    path = tmp_path / "warp.nii.gz"
    warp_of_surfa(grid, moving, u).save(str(path))
    header = nib.load(path).header
    assert header["intent_code"] == 1006
    assert header.get_data_shape() == (*FIXED, 1, 3)
    found = read_warp(path)
    assert found.layout == "displacement"
    np.testing.assert_allclose(found.field.data.numpy(), u, atol=1e-4)
    assert found.field.grid.matches(grid)
    assert found.moving is not None
    assert found.moving.matches(moving)


def test_surfa_reads_written_warps(tmp_path: Path, orientation: str) -> None:
    grid, moving = make_grid(orientation, FIXED, (1.7, 2.3, 3.1)), moving_grid()
    u = displacement(grid)
    path = tmp_path / "warp.nii.gz"
    write_warp(path, DisplacementField(torch.from_numpy(u), grid), moving)
    warp = surfa.load_warp(str(path))
    assert warp.format == surfa.Warp.Format.disp_ras
    np.testing.assert_allclose(warp.source.vox2world.matrix, moving.affine, atol=1e-4)
    np.testing.assert_allclose(warp.target.vox2world.matrix, grid.affine, atol=1e-4)
    voxels = np.moveaxis(warp.convert(surfa.Warp.Format.abs_crs).data, -1, 0)
    expected = np.moveaxis(moving.to_voxels(np.moveaxis(points_of(grid) + u, 0, -1)), -1, 0)
    np.testing.assert_allclose(voxels, expected, atol=5e-4)
    reread = read_warp(path)
    np.testing.assert_array_equal(reread.field.data.numpy(), u)
    assert reread.moving is not None
    assert reread.moving.matches(moving)


@pytest.mark.parametrize("suffix", [".nii.gz", ".mgz"])
@pytest.mark.parametrize("absolute", [False, True])
def test_layout_of_untagged_files_is_inferred(tmp_path: Path, orientation: str, suffix: str, absolute: bool) -> None:
    """SynthMorph of FreeSurfer 7.3 and 7.4 wrote displacements; EasyReg writes coordinates."""
    grid = make_grid(orientation, FIXED, (1.7, 2.3, 3.1))
    u = displacement(grid, size=9.0)
    values = np.moveaxis(u + points_of(grid) if absolute else u, 0, -1).astype(np.float32)
    kind = nib.Nifti1Image if suffix == ".nii.gz" else nib.MGHImage
    path = tmp_path / f"warp{suffix}"
    nib.save(kind(values, grid.affine), path)
    found = read_warp(path)
    assert found.layout == ("absolute" if absolute else "displacement")
    np.testing.assert_allclose(found.field.data.numpy(), u, atol=1e-4)
    assert found.field.grid.matches(grid)
    assert found.moving is None


def test_layout_is_inferred_for_rotations_and_ambiguity_raises(tmp_path: Path) -> None:
    grid = make_grid("oblique", FIXED, (1.7, 2.3, 3.1))
    points = points_of(grid)

    def write(angle: float, absolute: bool) -> Path:
        rigid = rigid_matrix(np.array([0, np.radians(angle), 0, 5, 9, -20]))
        mapped = np.einsum("ab,bijk->aijk", rigid[:3, :3], points) + rigid[:3, 3, None, None, None]
        values = mapped if absolute else mapped - points
        path = tmp_path / "rotation.nii.gz"
        nib.save(nib.Nifti1Image(np.moveaxis(values, 0, -1).astype(np.float32), grid.affine), path)
        return path

    for angle in (0, 20, 40):
        for absolute in (False, True):
            assert read_warp(write(angle, absolute)).layout == ("absolute" if absolute else "displacement")
    path = write(75, True)
    with pytest.raises(InputError, match="--kind"):
        read_warp(path)
    np.testing.assert_allclose(
        read_warp(path, "absolute").field.data.numpy() + points,
        np.moveaxis(nib.load(path).get_fdata(), -1, 0),
        atol=1e-3,
    )


@pytest.mark.filterwarnings("ignore:voxel size .* differs substantially:UserWarning")  # from surfa, for shears
def test_sheared_grids_are_preserved(tmp_path: Path) -> None:
    """The .mgz header has no shears; they are stored in a tag."""
    affine = make_grid("oblique", FIXED, (1.7, 2.3, 3.1)).affine.copy()
    affine[:3, :3] = affine[:3, :3] @ np.array([[1, 0.1, 0.05], [0, 1, -0.07], [0, 0, 1]])
    grid = Grid(FIXED, affine)
    u = displacement(grid)
    for name in ("warp.mgz", "warp.nii.gz"):
        warp_of_surfa(grid, grid, u).save(str(tmp_path / name))
        found = read_warp(tmp_path / name)
        assert found.field.grid.matches(grid)
        assert found.moving is not None
        assert found.moving.matches(grid)
        np.testing.assert_allclose(found.field.data.numpy(), u, atol=1e-3)
    write_warp(tmp_path / "written.nii.gz", DisplacementField(torch.from_numpy(u), grid), grid)
    np.testing.assert_allclose(
        surfa.load_warp(str(tmp_path / "written.nii.gz")).target.vox2world.matrix, affine, atol=1e-4
    )


@pytest.mark.parametrize("space", ["world", "voxel"])
def test_linear_transforms_agree_with_surfa_and_nitransforms(tmp_path: Path, orientation: str, space: str) -> None:
    """The file maps the moving image to the fixed one; dsiprep returns the inverse."""
    fixed, moving = make_grid(orientation, FIXED, (1.7, 2.3, 3.1)), moving_grid()
    matrix = TILT.copy()
    matrix[:3, :3] = matrix[:3, :3] @ np.array([[1.1, 0.02, 0], [0, 0.93, 0.04], [-0.03, 0, 1.05]])
    forward = surfa.Affine(matrix, source=geometry(moving), target=geometry(fixed), space="world")
    path = tmp_path / "x.lta"
    forward.convert(space=space).save(str(path))
    found = read_lta(path, "T1w", "template")
    assert (found.source, found.target) == ("T1w", "template")
    np.testing.assert_allclose(found.matrix, np.linalg.inv(matrix), atol=1e-4)
    linear = pytest.importorskip("nitransforms.linear")
    np.testing.assert_allclose(linear.load(path, fmt="fs").matrix, np.linalg.inv(matrix), atol=1e-4)


def test_invalid_files_raise(tmp_path: Path) -> None:
    grid, moving = make_grid("LAS", FIXED, (2, 2, 2)), moving_grid()
    warp = warp_of_surfa(grid, moving, displacement(grid))
    warp.convert(0).save(str(tmp_path / "good.mgz"))
    content = gzip.decompress((tmp_path / "good.mgz").read_bytes())
    bad = tmp_path / "bad.mgh"
    for broken, message in (
        (content[:100], "truncated"),
        (content[:2000], "truncated"),
        (content[:16] + struct.pack(">i", 1) + content[20:], "1 frames"),
        (content[:28] + b"\0\0" + content[30:], "no orientation"),
    ):
        bad.write_bytes(broken)
        with pytest.raises(InputError, match=message):
            read_warp(bad)
    stop = 284 + 12 * int(np.prod(FIXED)) + 20
    bad.write_bytes(content[:stop] + struct.pack(">iqiif", 13, 12, 0, 1, 0.0))
    with pytest.raises(InputError, match="--source"):
        read_warp(bad)
    assert read_warp(bad, moving=moving).layout == "voxel-absolute"
    bad.write_bytes(content[:stop] + struct.pack(">iqiif", 13, 12, 7, 1, 0.0))
    with pytest.raises(InputError, match="format 7"):
        read_warp(bad)
    image = tmp_path / "image.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.float32), np.eye(4)), image)
    with pytest.raises(InputError, match="three real numbers"):
        read_warp(image)
    nib.save(nib.Nifti1Image(np.full((4, 4, 4, 3), np.nan, np.float32), np.eye(4)), image)
    with pytest.raises(InputError, match="not numbers"):
        read_warp(image)
    lta = tmp_path / "x.lta"
    for text, message in (
        ("hello\n", "no line 'type"),
        ("type = 1\nnxforms = 2\n", "several"),
        ("type = 1\nnxforms = 1\n1 4 4\n1 0 0 0\n", "4 x 4"),
        ("type = 0\nnxforms = 1\n1 4 4\n1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\n", "geometry of the src"),
        ("type = 14\nnxforms = 1\n1 4 4\n1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\n", "lta_convert"),
    ):
        lta.write_text(text)
        with pytest.raises(InputError, match=message):
            read_lta(lta)
    with pytest.raises(OutputError):
        write_warp(tmp_path / "absent" / "x.nii.gz", DisplacementField(torch.zeros(3, *FIXED), grid), moving)
