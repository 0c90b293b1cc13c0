"""Transform files compared with ITK, ANTs and nitransforms."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from dsiprep.data.grid import Grid
from dsiprep.data.transform import Affine, Chain, DisplacementField
from dsiprep.errors import InputError, OutputError
from dsiprep.io.itk import (
    read_affine,
    read_affine_series,
    read_composite_h5,
    write_affine,
    write_affine_series,
    write_composite_h5,
    write_displacement_h5,
)
from dsiprep.ops.image.affine import rigid_matrix
from dsiprep.ops.image.displacement_field import chain_points
from dsiprep.ops.image.filters import gaussian

LPS = np.array([-1.0, -1.0, 1.0])


def oblique_grid(rng: np.random.Generator, shape: tuple[int, int, int] = (24, 19, 15)) -> Grid:
    """Anisotropic LAS grid, rotated by up to 0.5 rad about each axis."""
    affine = np.eye(4)
    affine[:3, :3] = np.diag([-1.7, 2.3, 3.1])
    rotation = np.concatenate([rng.uniform(-0.5, 0.5, 3), np.zeros(3)])
    affine = rigid_matrix(rotation) @ affine
    affine[:3, 3] += rng.uniform(-30, 30, 3)
    return Grid(shape, affine)


def random_field(rng: np.random.Generator, grid: Grid, size: float = 4.0) -> DisplacementField:
    noise = torch.from_numpy(rng.normal(size=(3, *grid.shape)).astype(np.float32))
    smooth = gaussian(noise, 2.0)
    return DisplacementField(smooth * (size / float(smooth.abs().max())), grid)


def random_affine(rng: np.random.Generator) -> Affine:
    matrix = np.eye(4)
    matrix[:3, :3] += rng.uniform(-0.2, 0.2, (3, 3))
    matrix[:3, 3] = rng.uniform(-20, 20, 3)
    return Affine(matrix, "a", "b")


def points_inside(rng: np.random.Generator, grid: Grid, count: int = 200) -> np.ndarray:
    return grid.to_world(rng.uniform(2, np.asarray(grid.shape) - 3.0, (count, 3)))


def itk_points(path: Path, points: np.ndarray) -> np.ndarray:
    sitk = pytest.importorskip("SimpleITK")
    transform = sitk.ReadTransform(str(path))
    return np.array([transform.TransformPoint((p * LPS).tolist()) for p in points]) * LPS


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("order", ["field", "affine field", "field affine", "affine field affine field"])
def test_composites_agree_with_itk(tmp_path: Path, seed: int, order: str) -> None:
    rng = np.random.default_rng(seed)
    grid = oblique_grid(rng)
    steps = []
    for kind in order.split():
        if kind == "field":
            steps.append(random_field(rng, grid))
        else:
            parameters = np.concatenate([rng.uniform(-0.05, 0.05, 3), rng.uniform(-2, 2, 3)])
            steps.append(Affine(rigid_matrix(parameters, grid.centre), "a", "b"))
    chain = Chain(tuple(steps), "a", "b")
    path = tmp_path / "chain.h5"
    write_composite_h5(path, chain)
    points = grid.to_world(rng.uniform(0.35, 0.65, (200, 3)) * (np.asarray(grid.shape) - 1))
    expected = itk_points(path, points)
    np.testing.assert_allclose(chain_points(chain, points), expected, atol=1e-3)
    reread = read_composite_h5(path)
    assert [type(s) for s in reread.steps] == [type(s) for s in steps]
    np.testing.assert_allclose(chain_points(reread, points), expected, atol=1e-3)
    assert np.abs(expected - points).max() > 0.5


def test_composite_of_twelve_transforms_keeps_its_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    chain = Chain(tuple(random_affine(rng) for _ in range(12)), "a", "b")
    path = tmp_path / "many.h5"
    write_composite_h5(path, chain)
    points = rng.uniform(-50, 50, (20, 3))
    np.testing.assert_allclose(itk_points(path, points), chain_points(chain, points), rtol=1e-6)
    np.testing.assert_allclose(chain_points(read_composite_h5(path), points), chain_points(chain, points))


def test_composites_written_by_itk_are_read(tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    rng = np.random.default_rng(3)
    composite = sitk.CompositeTransform(3)
    euler = sitk.Euler3DTransform((5.0, -3.0, 8.0), 0.1, -0.2, 0.3, (1.0, 2.0, 3.0))
    image = sitk.GetImageFromArray(rng.normal(size=(9, 11, 13, 3)), isVector=True)
    image.SetOrigin((-20, -25, -15))
    image.SetSpacing((3, 4, 5))
    composite.AddTransform(euler)
    composite.AddTransform(sitk.DisplacementFieldTransform(image))
    path = tmp_path / "itk.h5"
    sitk.WriteTransform(composite, str(path))
    points = rng.uniform(-8, 8, (50, 3))
    np.testing.assert_allclose(chain_points(read_composite_h5(path), points), itk_points(path, points), atol=1e-3)


def test_old_misspelled_dataset_names_are_read(tmp_path: Path) -> None:
    transform = random_affine(np.random.default_rng(0))
    path = tmp_path / "old.h5"
    write_composite_h5(path, Chain((transform,), "a", "b"))
    with h5py.File(path, "a") as file:
        for name in ("Parameters", "FixedParameters"):
            file.move(f"TransformGroup/1/Transform{name}", f"TransformGroup/1/Tranform{name}")
    np.testing.assert_allclose(read_affine(path).matrix, transform.matrix, atol=1e-12)


def test_displacement_field_files_agree_with_itk(tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    field = random_field(rng, oblique_grid(rng))
    path = tmp_path / "field.h5"
    write_displacement_h5(path, field)
    points = points_inside(rng, field.grid)
    np.testing.assert_allclose(itk_points(path, points), chain_points(Chain((field,), "a", "b"), points), atol=1e-3)
    reread = read_composite_h5(path).steps[0]
    assert isinstance(reread, DisplacementField)
    assert reread.grid.matches(field.grid)
    assert torch.equal(reread.data, field.data)


@pytest.mark.parametrize("suffix", [".txt", ".mat", ".h5"])
def test_affines_agree_with_itk_and_round_trip(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(1)
    transform = random_affine(rng)
    path = tmp_path / f"affine{suffix}"
    if suffix == ".h5":
        write_composite_h5(path, Chain((transform,), "a", "b"))
    else:
        write_affine(path, transform)
    points = rng.uniform(-80, 80, (30, 3))
    expected = points @ transform.matrix[:3, :3].T + transform.matrix[:3, 3]
    np.testing.assert_allclose(itk_points(path, points), expected, atol=1e-6)
    np.testing.assert_allclose(read_affine(path).matrix, transform.matrix, atol=1e-12)


def test_affine_format_is_inferred_from_content(tmp_path: Path) -> None:
    transform = random_affine(np.random.default_rng(6))
    write_affine(tmp_path / "text.txt", transform)
    (tmp_path / "text.txt").rename(tmp_path / "text.mat")
    np.testing.assert_allclose(read_affine(tmp_path / "text.mat").matrix, transform.matrix, atol=1e-12)
    with pytest.raises(InputError, match="not readable"):
        read_affine(tmp_path / "absent.mat")


@pytest.mark.parametrize("suffix", [".txt", ".mat"])
@pytest.mark.parametrize("zyx", [False, True])
def test_euler_transforms_and_centres_of_itk_are_read(tmp_path: Path, suffix: str, zyx: bool) -> None:
    sitk = pytest.importorskip("SimpleITK")
    euler = sitk.Euler3DTransform((5.0, -3.0, 8.0), 0.1, -0.2, 0.3, (1.0, 2.0, 3.0))
    euler.SetComputeZYX(zyx)
    affine = sitk.AffineTransform(euler.GetMatrix(), (4.0, 5.0, 6.0), (10.0, -20.0, 30.0))
    points = np.random.default_rng(2).uniform(-80, 80, (30, 3))
    for name, transform in (("euler", euler), ("affine", affine)):
        path = tmp_path / f"{name}{suffix}"
        sitk.WriteTransform(transform, str(path))
        matrix = read_affine(path).matrix
        expected = itk_points(path, points)
        np.testing.assert_allclose(points @ matrix[:3, :3].T + matrix[:3, 3], expected, atol=1e-6)


def test_affine_series_agrees_with_nitransforms(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    matrices = rigid_matrix(rng.uniform(-0.3, 0.3, (5, 6)) * [1, 1, 1, 20, 20, 20])
    path = tmp_path / "hmc_xfm.txt"
    write_affine_series(path, matrices)
    np.testing.assert_allclose(read_affine_series(path), matrices, atol=1e-12)
    assert path.read_text().count("#Transform ") == 5
    linear = pytest.importorskip("nitransforms.linear")
    np.testing.assert_allclose(linear.load(path, fmt="itk").matrix, matrices, atol=1e-6)


def test_ants_applies_written_transforms(tmp_path: Path) -> None:
    ants = pytest.importorskip("ants")
    from dsiprep.ops.image.displacement_field import chain_displacement
    from dsiprep.ops.image.interpolation import resample_onto

    rng = np.random.default_rng(8)
    grid = oblique_grid(rng, (20, 18, 14))
    rigid = Affine(rigid_matrix(np.array([0.1, -0.1, 0.15, 3, -2, 1]), grid.centre), "a", "b")
    chain = Chain((random_field(rng, grid), rigid), "a", "b")
    warp, mat = tmp_path / "warp.h5", tmp_path / "rigid.mat"
    write_composite_h5(warp, chain)
    write_affine(mat, rigid)
    data = gaussian(torch.from_numpy(rng.normal(size=(1, *grid.shape)).astype(np.float32)), 1.5)[0]
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ grid.affine
    image = ants.from_numpy(
        data.numpy(), lps[:3, 3].tolist(), grid.voxel_sizes.tolist(), lps[:3, :3] / grid.voxel_sizes
    )
    interior = (slice(5, -5),) * 3
    for path, steps in ((warp, chain), (mat, Chain((rigid,), "a", "b"))):
        theirs = ants.apply_transforms(image, image, [str(path)], interpolator="linear").numpy()
        ours = resample_onto(data[None], grid, grid, displacement=chain_displacement(steps, grid))[0].numpy()
        np.testing.assert_allclose(ours[interior], theirs[interior], atol=1e-3 * float(data.abs().max()))
    matrix = np.asarray(ants.read_transform(str(mat)).parameters)[:9].reshape(3, 3)
    np.testing.assert_allclose(matrix, np.diag(LPS) @ rigid.matrix[:3, :3] @ np.diag(LPS), atol=1e-6)


def test_invalid_files_raise(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.txt"
    wrong.write_text("1 0 0 0\n")
    with pytest.raises(InputError, match="Insight Transform"):
        read_affine(wrong)
    for suffix in (".h5", ".mat"):
        other = tmp_path / f"wrong{suffix}"
        other.write_text("1 0 0 0\n")
        with pytest.raises(InputError, match="wrong"):
            read_affine(other)
    write_affine_series(wrong, np.stack([np.eye(4)] * 2))
    with pytest.raises(InputError, match="2 transforms"):
        read_affine(wrong)
    with pytest.raises(OutputError, match="cannot be written"):
        write_affine(tmp_path / "absent" / "x.txt", Affine(np.eye(4), "a", "b"))


def test_failed_write_leaves_no_file(tmp_path: Path) -> None:
    grid = Grid((4, 4, 4), np.eye(4))
    broken = DisplacementField(torch.zeros(2, 4, 4, 4), grid)
    with pytest.raises(ValueError, match="broadcast"):
        write_displacement_h5(tmp_path / "x.h5", broken)
    assert list(tmp_path.iterdir()) == []
