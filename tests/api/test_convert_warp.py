"""`convert-warp`: all input and output formats, compared with independent implementations.

The fields are random and smooth, on oblique, anisotropic, left- and right-handed grids; all results agree to 1e-3 mm.
Inputs are written with surfa (FreeSurfer), the coordinates of fslpy (FSL) or SimpleITK; outputs are read with
SimpleITK, antspyx, surfa and nitransforms. Known limitations of these readers (SimpleITK 2.5.7, antspyx 0.6.3,
surfa 0.6.3, fslpy 3.29.1, nitransforms 25.1.0):

- SimpleITK and antspyx are correct for .h5 and for NIfTI intent 1007, including between voxels. They convert RAS to LPS
  when reading intent 1006, so they are correct there as well. They silently orthogonalise sheared NIfTI grids (an error
  of 0.4 mm in this test); in .h5 the shear is preserved.
- nitransforms is correct at voxel centres for .h5, and for intent 1007 with `fmt="itk"`. It is compared at voxel
  centres only, because it interpolates between them with cubic splines. With `fmt="itk"` it treats intent 1006 as LPS,
  an error of up to twice the displacement; read as a plain field it is correct. Its FSL reader only flips the sign of
  the first component, which is correct for axis-parallel LAS and RAS grids of two images with the same corner but wrong
  by millimetres otherwise, so fslpy is the reference for FSL.
- fslpy uses nearest-neighbour interpolation, so it is compared at voxel centres only.
- surfa is correct in all cases; see `test_freesurfer_warp.py`.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch

from dsiprep.api.convert_warp import convert_warp, read_transform
from dsiprep.cli.tools import main
from dsiprep.data.grid import Grid
from dsiprep.data.transform import Affine, Chain, DisplacementField
from dsiprep.errors import InputError, OutputError
from dsiprep.io import freesurfer, itk
from dsiprep.io.vector_image import write_vectors
from dsiprep.ops.image.affine import rigid_matrix
from dsiprep.ops.image.displacement_field import chain_points, chain_points_back
from helpers.grids import make_grid
from helpers.smooth_warp import FIXED, LPS, MOVING, TILT, centres, displacement, image_at

KINDS = ("itk .nii", "itk .h5", "freesurfer .nii", "freesurfer .mgz", "freesurfer old", "easyreg", "fsl", "fsl abs")


def moving_grid(orientation: str = "PSR") -> Grid:
    grid = make_grid(orientation, MOVING, (2.6, 2.1, 2.9))
    return Grid(MOVING, TILT @ grid.affine)


def random_points(grid: Grid, count: int = 120) -> np.ndarray:
    return grid.to_world(np.random.default_rng(1).uniform(1, np.asarray(grid.shape) - 2.0, (count, 3)))


def make_input(kind: str, folder: Path, grid: Grid, moving: Grid, u: np.ndarray) -> tuple[Path, list[str]]:
    """Write a warp of one kind with third-party software; return its path and the options it needs."""
    vectors = np.moveaxis(u, 0, -1).astype(np.float32)
    if kind.startswith("itk"):
        image = sitk.GetImageFromArray(np.ascontiguousarray((vectors * LPS).transpose(2, 1, 0, 3)), isVector=True)
        image.SetSpacing(grid.voxel_sizes.tolist())
        image.SetOrigin((LPS * grid.affine[:3, 3]).tolist())
        image.SetDirection((LPS[:, None] * grid.directions).ravel().tolist())
        path = folder / f"in{'.nii.gz' if kind == 'itk .nii' else '.h5'}"
        if kind == "itk .nii":
            sitk.WriteImage(image, str(path))
            assert int(nib.load(path).header["intent_code"]) == 1007
        else:
            field = sitk.DisplacementFieldTransform(sitk.Cast(image, sitk.sitkVectorFloat64))
            sitk.WriteTransform(sitk.CompositeTransform([field]), str(path))
        return path, []
    if kind in ("freesurfer .nii", "freesurfer .mgz"):
        surfa = pytest.importorskip("surfa")
        geometries = [surfa.ImageGeometry(shape=g.shape, vox2world=g.affine) for g in (moving, grid)]
        warp = surfa.Warp(vectors, *geometries, format=surfa.Warp.Format.disp_ras)
        path = folder / f"in{'.nii.gz' if kind.endswith('.nii') else '.mgz'}"
        (warp if kind.endswith(".nii") else warp.convert(surfa.Warp.Format.abs_crs)).save(str(path))
        return path, []
    path = folder / "in.nii.gz"
    if kind.startswith("fsl"):
        image = pytest.importorskip("fsl.data.image")
        ref, src = (image.Image(np.zeros(g.shape), xform=g.affine) for g in (grid, moving))
        affine = pytest.importorskip("fsl.transform.affine")
        coordinates = affine.transform((centres(grid) + vectors).reshape(-1, 3), src.getAffine("world", "fsl"))
        fixed = affine.transform(centres(grid).reshape(-1, 3), ref.getAffine("world", "fsl"))
        values = (coordinates if kind == "fsl abs" else coordinates - fixed).reshape(vectors.shape)
        out = nib.Nifti1Image(values.astype(np.float32), grid.affine)
        out.header.set_intent(2006, allow_unknown=True)
        nib.save(out, path)
        return path, ["--source", str(image_at(folder / "source.nii.gz", moving))]
    values = vectors + centres(grid) if kind == "easyreg" else vectors
    nib.save(nib.Nifti1Image(values.astype(np.float32), grid.affine), path)
    return path, []


def by_simpleitk(path: Path, points: np.ndarray) -> np.ndarray:
    if path.suffix == ".h5":
        transform = sitk.ReadTransform(str(path))
    else:
        transform = sitk.DisplacementFieldTransform(sitk.ReadImage(str(path), sitk.sitkVectorFloat64))
    return np.array([transform.TransformPoint((p * LPS).tolist()) for p in points]) * LPS


def by_ants(path: Path, points: np.ndarray) -> np.ndarray:
    ants, pandas = pytest.importorskip("ants"), pytest.importorskip("pandas")
    table = pandas.DataFrame(points * LPS, columns=list("xyz"))
    return ants.apply_transforms_to_points(3, table, [str(path)]).to_numpy()[:, :3] * LPS


def by_nitransforms(path: Path, points: np.ndarray) -> np.ndarray:
    """Correct at voxel centres only."""
    if path.suffix == ".h5":
        return pytest.importorskip("nitransforms.manip").load(path, fmt="itk").map(points)
    return pytest.importorskip("nitransforms.nonlinear").load(path, fmt="itk").map(points)


def truth(grid: Grid, u: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function x + u(x), interpolated linearly with SciPy."""
    from scipy.ndimage import map_coordinates

    def mapped(points: np.ndarray) -> np.ndarray:
        voxels = grid.to_voxels(points).T
        return points + np.stack([map_coordinates(part.astype(float), voxels, order=1) for part in u], axis=-1)

    return mapped


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_converts_to_itk_composite(tmp_path: Path, orientation: str, kind: str) -> None:
    grid, moving = make_grid(orientation, FIXED, (1.7, 2.3, 3.1)), moving_grid()
    u = displacement(grid)
    path, options = make_input(kind, tmp_path, grid, moving, u)
    out = tmp_path / "out.h5"
    assert main(["convert-warp", str(path), str(out), *options]) == 0
    points, expected = random_points(grid), truth(grid, u)
    np.testing.assert_allclose(by_simpleitk(out, points), expected(points), atol=1e-3)
    np.testing.assert_allclose(by_ants(out, points), expected(points), atol=1e-3)
    inner = centres(grid)[2:-2, 2:-2, 2:-2].reshape(-1, 3)
    np.testing.assert_allclose(by_nitransforms(out, inner), expected(inner), atol=1e-3)
    assert np.abs(expected(points) - points).max() > 1.5


@pytest.mark.parametrize("to", ["itk", "freesurfer"])
@pytest.mark.parametrize("kind", ["itk .h5", "freesurfer .mgz", "fsl"])
def test_every_kind_converts_to_nifti(
    tmp_path: Path, orientation: str, kind: str, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, moving = make_grid(orientation, FIXED, (1.7, 2.3, 3.1)), moving_grid()
    u = displacement(grid)
    path, options = make_input(kind, tmp_path, grid, moving, u)
    if kind == "itk .h5":
        options = ["--source", str(image_at(tmp_path / "source.nii.gz", moving))]
    out = tmp_path / "out.nii.gz"
    assert main(["convert-warp", str(path), str(out), "--to", to, *options]) == 0
    points, expected = random_points(grid), truth(grid, u)
    assert int(nib.load(out).header["intent_code"]) == {"itk": 1007, "freesurfer": 1006}[to]
    np.testing.assert_allclose(by_simpleitk(out, points), expected(points), atol=1e-3)
    np.testing.assert_allclose(by_ants(out, points), expected(points), atol=1e-3)
    inner = centres(grid)[2:-2, 2:-2, 2:-2].reshape(-1, 3)
    if to == "itk":
        np.testing.assert_allclose(by_nitransforms(out, inner), expected(inner), atol=1e-3)
        return
    surfa = pytest.importorskip("surfa")
    monkeypatch.setattr(np, "fromstring", lambda content, dtype: np.frombuffer(content, dtype).copy())
    coordinates = surfa.load_warp(str(out)).convert(surfa.Warp.Format.abs_crs).data
    np.testing.assert_allclose(moving.to_world(coordinates), centres(grid) + np.moveaxis(u, 0, -1), atol=2e-3)


def test_fsl_warp_matches_fslpy(tmp_path: Path, orientation: str) -> None:
    """fslpy reads the same file, for moving images of either handedness."""
    fnirt, image = pytest.importorskip("fsl.transform.fnirt"), pytest.importorskip("fsl.data.image")
    grid = make_grid(orientation, FIXED, (1.7, 2.3, 3.1))
    inner = centres(grid)[1:-1, 1:-1, 1:-1].reshape(-1, 3)
    for handed in ("RAS", "LAS"):
        moving = moving_grid(handed)
        source = image_at(tmp_path / f"{handed}.nii.gz", moving)
        raw = np.moveaxis(displacement(grid, 3), 0, -1) + 4.0
        path = tmp_path / f"warp{handed}.nii.gz"
        out = nib.Nifti1Image(raw.astype(np.float32), grid.affine)
        out.header.set_intent(2006, allow_unknown=True)
        nib.save(out, path)
        reference = image.Image(str(image_at(tmp_path / "ref.nii.gz", grid)))
        warp = fnirt.readFnirt(str(path), image.Image(str(source)), reference, defType="relative")
        expected = warp.transform(inner, "world", "world")
        convert_warp(path, tmp_path / "out.h5", source=source, kind="fsl")
        np.testing.assert_allclose(by_simpleitk(tmp_path / "out.h5", inner), expected, atol=1e-3)


def test_fsl_warp_without_affine_uses_the_grid_of_the_reference(tmp_path: Path) -> None:
    """As written by convertwarp before FSL 6.0.5."""
    grid, moving = make_grid("LAS", FIXED, (2, 2, 2.5)), moving_grid()
    u = displacement(grid)
    path, options = make_input("fsl", tmp_path, grid, moving, u)
    image = nib.load(path)
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    bare = tmp_path / "bare.nii.gz"
    nib.save(image, bare)
    with pytest.raises(InputError, match="--reference"):
        convert_warp(bare, tmp_path / "out.h5", source=Path(options[1]))
    convert_warp(bare, tmp_path / "out.h5", source=Path(options[1]), reference=image_at(tmp_path / "ref.nii", grid))
    points = random_points(grid)
    np.testing.assert_allclose(by_simpleitk(tmp_path / "out.h5", points), truth(grid, u)(points), atol=1e-3)


@pytest.mark.parametrize("suffix", [".lta", ".mat", "float.mat", ".txt", ".tfm", ".h5"])
def test_affine_is_applied_after_the_warp_as_in_ants(tmp_path: Path, suffix: str) -> None:
    ants, pandas = pytest.importorskip("ants"), pytest.importorskip("pandas")
    grid, moving = make_grid("oblique", FIXED, (1.7, 2.3, 3.1)), moving_grid()
    linear = rigid_matrix(np.array([0.05, 0.1, -0.2, 7, 1, -9])) @ np.diag([1.1, 0.95, 1.02, 1])
    mat = tmp_path / "affine.mat"
    itk.write_affine(mat, Affine(linear, "a", "b"))
    given = tmp_path / f"given{suffix}"
    if suffix == ".lta":
        surfa = pytest.importorskip("surfa")
        geometries = [surfa.ImageGeometry(shape=g.shape, vox2world=g.affine) for g in (moving, grid)]
        surfa.Affine(np.linalg.inv(linear), *geometries, space="world").convert(space="voxel").save(str(given))
    elif suffix == "float.mat":  # format of antsRegistration --float
        parameters = sitk.ReadTransform(str(mat)).GetParameters()
        blocks = [(b"AffineTransform_float_3_3\0", np.asarray(parameters, "<f4")), (b"fixed\0", np.zeros(3, "<f4"))]
        given.write_bytes(b"".join(struct.pack("<5i", 10, len(v), 1, 0, len(n)) + n + v.tobytes() for n, v in blocks))
        np.testing.assert_allclose(sitk.ReadTransform(str(given)).GetParameters(), parameters, rtol=1e-6)
    else:
        sitk.WriteTransform(sitk.ReadTransform(str(mat)), str(given))
    warp, _ = make_input("itk .nii", tmp_path, grid, moving, displacement(grid))
    points = random_points(grid)
    table = pandas.DataFrame(points * LPS, columns=list("xyz"))
    expected = ants.apply_transforms_to_points(3, table, [str(warp), str(mat)]).to_numpy()[:, :3] * LPS
    assert np.abs(expected - points).max() > 10
    for name in ("out.h5", "out.nii.gz"):
        convert_warp(warp, tmp_path / name, affine=given)
        # the composed field interpolates the same vectors as ANTs does
        np.testing.assert_allclose(by_simpleitk(tmp_path / name, points), expected, atol=1e-3)
    convert_warp(given, tmp_path / "linear.txt")
    np.testing.assert_allclose(itk.read_affine(tmp_path / "linear.txt").matrix, linear, atol=1e-4)
    convert_warp(given, tmp_path / "inverse.mat", invert=True)
    np.testing.assert_allclose(itk.read_affine(tmp_path / "inverse.mat").matrix, np.linalg.inv(linear), atol=1e-4)
    convert_warp(given, tmp_path / "field.nii", reference=image_at(tmp_path / "ref.nii", grid))
    np.testing.assert_allclose(
        by_simpleitk(tmp_path / "field.nii", points), points @ linear[:3, :3].T + linear[:3, 3], atol=1e-3
    )


@pytest.mark.parametrize("kind", ["itk .nii", "freesurfer .mgz", "fsl"])
def test_forward_after_inverse_is_identity(
    tmp_path: Path, orientation: str, kind: str, capsys: pytest.CaptureFixture
) -> None:
    """For a field that includes an affine transform, as SynthMorph writes it; both directions are applied by ITK."""
    grid = make_grid(orientation, (30, 27, 24), (1.7, 2.0, 2.4))
    turn = rigid_matrix(np.array([0.15, -0.1, 0.25, 0, 0, 0]), grid.centre) @ np.diag([1.05, 0.96, 1.0, 1])
    turn[:3, 3] += [20, -10, 15]
    nonlinear = displacement(grid, size=3.0)
    u = np.moveaxis(centres(grid) @ (turn[:3, :3] - np.eye(3)).T + turn[:3, 3] + np.moveaxis(nonlinear, 0, -1), -1, 0)
    moving = Grid(MOVING, make_grid("PSR", MOVING, (2.1, 1.9, 2.2)).affine)
    shift = chain_points(Chain((Affine(turn, "", ""),), "", ""), grid.centre[None])[0] - moving.centre
    moving.affine[:3, 3] += shift
    path, options = make_input(kind, tmp_path, grid, moving, u)
    if not options:
        options = ["--source", str(image_at(tmp_path / "source.nii", moving))]
    out, inverse = tmp_path / "out.h5", tmp_path / "inverse.h5"
    assert main(["convert-warp", str(path), str(out), *options]) == 0
    assert main(["convert-warp", str(path), str(inverse), "--invert", *options]) == 0
    assert "forward after inverse" in capsys.readouterr().out
    start = moving.to_world(np.random.default_rng(0).uniform(0, np.asarray(MOVING) - 1.0, (2000, 3)))
    inverted = by_simpleitk(inverse, start)
    voxels = grid.to_voxels(inverted)
    inside = ((voxels >= 0) & (voxels <= np.asarray(grid.shape) - 1)).all(axis=1)
    assert inside.mean() > 0.9
    error = np.linalg.norm(by_simpleitk(out, inverted) - start, axis=1)[inside]
    # bounds for the interpolation error with voxels of 2 mm
    assert error.mean() < 0.01
    assert error.max() < 0.05


def test_chain_points_back_inverts_a_chain() -> None:
    grid = make_grid("oblique", (30, 27, 24), (1.7, 2.0, 2.4))
    fields = [DisplacementField(torch.from_numpy(displacement(grid, seed, 3.0)), grid) for seed in (0, 1)]
    chain = Chain((fields[0], Affine(TILT, "", ""), fields[1]), "", "")
    points = grid.to_world(np.random.default_rng(2).uniform(0.4, 0.6, (99, 3)) * np.asarray(grid.shape))
    np.testing.assert_allclose(chain_points_back(chain, chain_points(chain, points)), points, atol=2e-3)


def test_reported_inverse_error_matches_the_files(tmp_path: Path) -> None:
    """With a field too steep for its grid, so that the inverse is inaccurate between voxels."""
    grid = make_grid("LAS", FIXED, (2, 2, 2))
    u = displacement(grid, size=4.5)
    path, _ = make_input("itk .nii", tmp_path, grid, grid, u)
    messages = convert_warp(path, tmp_path / "inverse.h5", invert=True)
    assert any("--source" in message for message in messages)
    accuracy = next(message for message in messages if "on average" in message)
    pattern = r"([\d.]+) mm (?:on average|at the 99.9th percentile)"
    mean, percentile = (float(number) for number in re.findall(pattern, accuracy))
    start = grid.to_world(np.random.default_rng(5).uniform(0, np.asarray(grid.shape) - 1.0, (20_000, 3)))
    inverted = by_simpleitk(tmp_path / "inverse.h5", start)
    voxels = grid.to_voxels(inverted)
    inside = ((voxels >= 0) & (voxels <= np.asarray(grid.shape) - 1)).all(axis=1)
    error = np.linalg.norm(truth(grid, u)(inverted) - start, axis=1)[inside]
    assert mean == pytest.approx(error.mean(), rel=0.05)
    assert mean > 0.002
    assert percentile == pytest.approx(np.quantile(error, 0.999), rel=0.25)


def test_reference_defines_the_output_grid(tmp_path: Path) -> None:
    grid, other = make_grid("oblique", FIXED, (1.7, 2.3, 3.1)), make_grid("LPS", (9, 10, 11), (1.3, 1.2, 1.1))
    u = displacement(grid)
    path, _ = make_input("itk .nii", tmp_path, grid, grid, u)
    for name in ("out.h5", "out.nii.gz"):
        convert_warp(path, tmp_path / name, reference=image_at(tmp_path / "ref.nii", other))
        points = centres(other)[1:-1, 1:-1, 1:-1].reshape(-1, 3)
        np.testing.assert_allclose(by_simpleitk(tmp_path / name, points), truth(grid, u)(points), atol=1e-3)
    fixed = itk.read_composite_h5(tmp_path / "out.h5").steps[0]
    assert isinstance(fixed, DisplacementField)
    assert fixed.grid.matches(other)


def test_mgz_image_can_be_the_source(tmp_path: Path) -> None:
    grid, moving = make_grid("LAS", FIXED, (2, 2, 2.5)), moving_grid()
    path, _ = make_input("fsl", tmp_path, grid, moving, displacement(grid))
    nib.save(nib.MGHImage(np.zeros(moving.shape, np.float32), moving.affine), tmp_path / "orig.mgz")
    convert_warp(path, tmp_path / "out.h5", source=tmp_path / "orig.mgz")
    points = random_points(grid)
    np.testing.assert_allclose(
        by_simpleitk(tmp_path / "out.h5", points), truth(grid, displacement(grid))(points), atol=1e-3
    )


def test_sheared_grid_is_preserved_in_h5_and_rejected_for_nifti(tmp_path: Path) -> None:
    affine = make_grid("oblique", FIXED, (1.7, 2.3, 3.1)).affine.copy()
    affine[:3, :3] = affine[:3, :3] @ np.array([[1, 0.1, 0.05], [0, 1, -0.07], [0, 0, 1]])
    grid = Grid(FIXED, affine)
    u = displacement(grid)
    path = tmp_path / "warp.nii.gz"
    freesurfer.write_warp(path, DisplacementField(torch.from_numpy(u), grid), grid)
    convert_warp(path, tmp_path / "out.h5")
    points = random_points(grid)
    np.testing.assert_allclose(by_simpleitk(tmp_path / "out.h5", points), truth(grid, u)(points), atol=1e-3)
    with pytest.raises(OutputError, match="right angles"):
        convert_warp(path, tmp_path / "out.nii.gz")
    assert not (tmp_path / "out.nii.gz").exists()


def test_message_warns_about_unmarked_freesurfer_warp(tmp_path: Path) -> None:
    grid = make_grid("LAS", FIXED, (2, 2, 2))
    path, _ = make_input("freesurfer old", tmp_path, grid, grid, displacement(grid))
    assert any("--kind fsl" in message for message in convert_warp(path, tmp_path / "out.h5"))
    write_vectors(path, displacement(grid), grid, 1006)
    assert not any("--kind fsl" in message for message in convert_warp(path, tmp_path / "out.h5"))
    assert read_transform(path).moving is None
