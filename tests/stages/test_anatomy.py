"""The anatomy stage on heads made from the packaged template, whose pose and tissue are known."""

from __future__ import annotations

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation

from dsiprep.data.grid import Grid, Volume
from dsiprep.data.template import Template
from dsiprep.data.transform import Affine, Chain
from dsiprep.errors import InputError
from dsiprep.io.templates import load_template
from dsiprep.ops.image.affine import rigid_matrix
from dsiprep.ops.image.displacement_field import chain_points
from dsiprep.ops.image.filters import resample_to_spacing
from dsiprep.ops.image.interpolation import resample_onto
from dsiprep.ops.registration.head_size import enlarge_matrix, enlarge_volume
from dsiprep.settings import AnatomySettings, CoregisterSettings
from dsiprep.stages import anatomy
from dsiprep.stages.anatomy import process_anatomy
from dsiprep.stages.coregister import coregister

POSE = rigid_matrix(np.array([0.22, -0.06, 0.12, 8.0, -14.0, 22.0]))  # points of ACPC to the scanner


def _dice(first: np.ndarray, second: np.ndarray) -> float:
    return 2 * np.sum(first & second) / (first.sum() + second.sum())


@pytest.fixture(scope="module")
def template() -> Template:
    """The packaged template at 3 mm."""
    full = load_template("MNI152NLin2009aSym")

    def coarse(data: torch.Tensor) -> torch.Tensor:
        return resample_to_spacing(Volume(data, full.brain.grid), 3.0).data

    grid = full.brain.grid.at_spacing(3.0)
    mask = (coarse(full.mask.data) > 0.5).float()
    tissue = torch.stack([coarse(t) for t in full.tissue]) * mask
    return Template(full.name, Volume(coarse(full.brain.data) * mask, grid), Volume(mask, grid), tissue, "test")


def _scanner_grid(mm: float, axes: str) -> Grid:
    shape = tuple(round(length / mm) for length in (190, 230, 220))
    affine = np.diag([mm, mm, mm, 1.0])
    affine[:3, 3] = POSE[:3, 3] - (95, 125, 110) + np.array([0, -10.0, 10.0])
    image = nib.Nifti1Image(np.zeros(shape, np.uint8), affine)
    orientations = [nib.orientations.axcodes2ornt(codes) for codes in ("RAS", axes)]
    turned = image.as_reoriented(nib.orientations.ornt_transform(*orientations))
    return Grid(turned.shape, turned.affine)


def _to_person(points: np.ndarray) -> np.ndarray:
    """Points of the person in ACPC space to points of the template: 4 % smaller, and bent by up to 4 mm."""
    bend = 4 * np.sin(points[..., [1, 2, 0]] / 25.0) * np.exp(-((points / 55.0) ** 2).sum(-1, keepdims=True))
    return points * 1.04 + bend


def _subject(grid: Grid, weights: tuple[float, float, float], scalp: float) -> tuple[Volume, np.ndarray, np.ndarray]:
    """A head in the scanner: image, brain, and tissue labels (0 to 2) where there is brain."""
    full = load_template("MNI152NLin2009aSym")
    world = grid.to_world(np.moveaxis(np.indices(grid.shape), 0, -1))
    inverse = np.linalg.inv(POSE)
    at = _to_person(world @ inverse[:3, :3].T + inverse[:3, 3])
    voxels = torch.from_numpy(np.moveaxis(full.brain.grid.to_voxels(at), -1, 0).astype(np.float32))
    identity = Grid(grid.shape, np.eye(4))
    own = voxels - torch.from_numpy(np.indices(grid.shape).astype(np.float32))
    tissue = resample_onto(full.tissue, Grid(full.brain.grid.shape, np.eye(4)), identity, displacement=own)
    brain = tissue.sum(0).numpy() > 0.5
    away = ndimage.distance_transform_edt(~brain, sampling=grid.voxel_sizes)
    data = np.tensordot(np.array(weights), tissue.numpy(), 1) + np.where((away > 8) & (away < 15), scalp, 0)
    data *= np.exp(0.003 * (world[..., 1] - POSE[1, 3]))
    rng = np.random.default_rng(0)
    data = np.abs(data + rng.normal(0, 2, data.shape)).astype(np.float32)
    return Volume(torch.from_numpy(data), grid), brain, tissue.argmax(0).numpy()


@pytest.fixture(scope="module")
def head():
    return _subject(_scanner_grid(2.0, "PSR"), (28, 68, 108), 120)


@pytest.fixture(scope="module")
def found(head, template):
    return process_anatomy((head[0],), None, None, template, AnatomySettings())


def _pose_error(matrix: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Degrees, and mm at the anterior commissure."""
    turn = Rotation.from_matrix(matrix[:3, :3].T @ truth[:3, :3]).magnitude()
    return float(np.degrees(turn)), float(np.linalg.norm(matrix[:3, 3] - truth[:3, 3]))


def test_pose_is_recovered_and_rigid(found):
    matrix = found.anat_to_acpc.matrix
    degrees, millimetres = _pose_error(matrix, POSE)
    assert degrees < 2 and millimetres < 1.5
    assert np.allclose(matrix[:3, :3] @ matrix[:3, :3].T, np.eye(3), atol=1e-9)
    assert (found.anat_to_acpc.source, found.anat_to_acpc.target) == ("anat", "ACPC")


def test_grid_is_lps_native_and_holds_the_head(found, head):
    grid = found.image.grid
    assert nib.aff2axcodes(grid.affine) == ("L", "P", "S")
    assert np.allclose(grid.voxel_sizes, 2.0)
    bright = np.argwhere(head[0].numpy() > 40)
    world = head[0].grid.to_world(bright)
    inverse = np.linalg.inv(found.anat_to_acpc.matrix)
    voxels = grid.to_voxels(world @ inverse[:3, :3].T + inverse[:3, 3])
    assert voxels.min() >= 0 and np.all(voxels.max(0) <= np.array(grid.shape) - 1)


def test_mask_and_tissue_meet_the_truth(found, head):
    _, brain, labels = head
    pose, native = found.anat_to_acpc.matrix, head[0].grid
    onto = [(brain & (labels == t)).astype(np.float32) for t in range(3)]
    truth = resample_onto(torch.from_numpy(np.stack(onto)), native, found.image.grid, pose).numpy()
    inside = truth.sum(0) > 0.5
    mask = found.mask.numpy() > 0.5
    assert set(np.unique(found.mask.numpy())) == {0.0, 1.0}
    assert _dice(mask, inside) > 0.95
    best = found.tissue.argmax(0).numpy()
    both = mask & inside  # the mask was judged above; here it is tissue in the brain
    scores = [_dice((best == t) & both, (truth.argmax(0) == t) & both) for t in range(3)]
    assert scores[0] > 0.7 and scores[1] > 0.85 and scores[2] > 0.85


def test_chains_lead_to_the_template_and_back(found, template):
    assert found.template == found.acpc_to_template.target == "MNI152NLin2009aSym"
    assert found.acpc_to_template.source == "ACPC"
    rng = np.random.default_rng(0)
    inside = np.argwhere(ndimage.binary_erosion(template.mask.numpy() > 0.5, iterations=3))
    points = template.brain.grid.to_world(inside[rng.choice(len(inside), 400)])
    there = chain_points(found.acpc_to_template, points)
    assert np.abs(chain_points(found.template_to_acpc, there) - points).mean() < 0.2
    truth = _to_person(there)
    error = np.linalg.norm(truth - points, axis=1)
    linear = np.linalg.norm(_to_person(points / 1.04) - points, axis=1)
    assert error.mean() < 1.5
    assert error.mean() < 0.6 * linear.mean()


def test_the_normalisation_ends_at_the_voxels_asked_for(head, template):
    brain, rim = Volume(template.brain.data * 0.9, template.brain.grid), template.mask
    forward, _ = anatomy._normalise(brain, template, rim, np.eye(4), AnatomySettings(finest_mm=6.0))
    np.testing.assert_allclose(forward.steps[0].grid.voxel_sizes, 6.0, rtol=0.05)


def test_warped_brain_looks_like_the_template(found, template):
    assert found.warped.grid.matches(template.brain.grid)
    inside = template.mask.numpy() > 0.5
    correlation = np.corrcoef(found.warped.numpy()[inside], template.brain.numpy()[inside])[0, 1]
    assert correlation > 0.9
    assert found.notes == ()
    assert len(found.orig_to_anat) == 1


def test_without_normalisation_and_with_two_images(head, template):
    """The second image is the first, moved: the average keeps the first's space and is less noisy."""
    image = head[0]
    moved = rigid_matrix(np.array([0.03, 0, -0.04, 3, -2, 1.0]))
    grid = Grid(image.grid.shape, moved @ image.grid.affine)
    noise = np.random.default_rng(5).normal(0, 2, grid.shape).astype(np.float32)
    second = Volume((image.data + torch.from_numpy(noise)) * 3, grid)
    settings = AnatomySettings(normalize=False, biascorrect="none")
    found = process_anatomy((image, second), None, None, template, settings)
    degrees, millimetres = _pose_error(found.anat_to_acpc.matrix, POSE)
    assert degrees < 2 and millimetres < 1.5
    assert found.acpc_to_template is None and found.template_to_acpc is None and found.warped is None
    assert found.tissue is not None
    assert any("2 structural images" in note for note in found.notes)
    first, other = found.orig_to_anat  # points of the first image to points of each as it was acquired
    np.testing.assert_array_equal(first.matrix, np.eye(4))
    degrees, millimetres = _pose_error(other.matrix, moved)
    assert degrees < 0.2 and millimetres < 0.2
    alone = resample_onto(image.data[None], image.grid, found.image.grid, found.anat_to_acpc.matrix, cubic=True)[0]
    inside = found.mask.numpy() > 0.5
    assert np.corrcoef(alone.numpy()[inside], found.image.numpy()[inside])[0, 1] > 0.99


@pytest.mark.parametrize("given", ["no images", "modality none"])
def test_the_dwiref_stands_in(head, template, given):
    volume, _, _ = _subject(_scanner_grid(3.0, "LAS"), (200, 90, 65), 12)
    images = (head[0],) if given == "modality none" else ()
    found = process_anatomy(images, volume, None, template, AnatomySettings(modality="none" if images else "T1w"))
    degrees, millimetres = _pose_error(found.anat_to_acpc.matrix, POSE)
    assert degrees < 3 and millimetres < 4
    assert found.modality == "none" and found.tissue is None and found.acpc_to_template is None
    assert np.allclose(found.image.grid.voxel_sizes, 3.0)
    assert nib.aff2axcodes(found.image.grid.affine) == ("L", "P", "S")
    assert any("b=0 reference stands in" in note for note in found.notes)


def test_nothing_to_work_with_is_told(template):
    with pytest.raises(InputError, match="b=0"):
        process_anatomy((), None, None, template, AnatomySettings())


def test_an_animal_is_treated_like_a_person_of_its_size(head, template):
    """The same head at a twentieth of the length, with its mask and a template of its size; and its b=0 onto it."""
    small = 0.05
    image, brain, _ = head
    own = replace(
        template, name="Mouse", brain=enlarge_volume(template.brain, small), mask=enlarge_volume(template.mask, small)
    )
    mask = Volume(torch.from_numpy(brain.astype(np.float32)), image.grid)
    settings = AnatomySettings(normalize=False, biascorrect="none")
    found = process_anatomy((enlarge_volume(image, small),), None, None, own, settings, enlarge_volume(mask, small))
    np.testing.assert_allclose(found.image.grid.voxel_sizes, 2.0 * small, rtol=1e-6)
    degrees, millimetres = _pose_error(found.anat_to_acpc.matrix, enlarge_matrix(POSE, small))
    assert degrees < 2 and millimetres < 1.5 * small
    series, inside, _ = _subject(_scanner_grid(3.0, "LAS"), (200, 90, 65), 12)
    inside = enlarge_volume(Volume(torch.from_numpy(inside.astype(np.float32)), series.grid), small)
    onto = coregister(enlarge_volume(series, small), inside, found, CoregisterSettings())
    degrees, millimetres = _pose_error(onto.dwiref_to_acpc.matrix, found.anat_to_acpc.matrix)
    assert degrees < 1 and millimetres < 1.0 * small
    with pytest.raises(InputError, match="--anat-mask"):
        process_anatomy((enlarge_volume(image, small),), None, None, own, settings)


def test_a_t2w_with_a_mask_of_its_own(template):
    """CSF brightest, white matter darkest; the mask is the one that was given."""
    image, brain, _ = _subject(_scanner_grid(3.0, "RAS"), (200, 100, 70), 40)
    mask = Volume(torch.from_numpy(brain.astype(np.float32)), image.grid)
    settings = AnatomySettings(modality="T2w", normalize=False, biascorrect="none")
    found = process_anatomy((image,), None, None, template, settings, mask)
    degrees, millimetres = _pose_error(found.anat_to_acpc.matrix, POSE)
    assert degrees < 2 and millimetres < 1.5
    assert found.modality == "T2w" and found.notes == ()
    volume = float(found.mask.data.sum()) * np.prod(found.mask.grid.voxel_sizes)
    assert abs(volume / (brain.sum() * 27.0) - 1) < 0.02


def test_a_template_without_priors_gives_no_tissue(head, template):
    bare = replace(template, tissue=None, note="Another one was taken.")
    found = process_anatomy((head[0],), None, None, bare, AnatomySettings(biascorrect="none", finest_mm=8.0))
    assert found.tissue is None and found.acpc_to_template is not None
    assert any("without tissue priors" in note for note in found.notes)
    assert "Another one was taken." in found.notes


def test_programs_may_do_some_of_the_work(head, template):
    """What they find is taken as it is, and they are given what they need."""
    native, brain, _ = head
    given = {}

    def normalise(image, to, rim, start, settings):
        given.update(image=image, start=start, rim=rim)
        there = Affine(start, "ACPC", to.name)
        return Chain((there,), "ACPC", to.name), Chain((there.inverse(),), to.name, "ACPC")

    def tissue(image, mask, priors):
        given["priors"] = priors
        return torch.full((3, *image.grid.shape), 1 / 3) * mask.data, Volume(7 * mask.data, image.grid)

    def mask(image):
        given["mask"] = image
        return Volume(torch.from_numpy(brain.astype(np.float32)), image.grid)

    settings = AnatomySettings(biascorrect="none")
    found = process_anatomy((native,), None, None, template, settings, steps=anatomy.Steps(mask, tissue, normalise))
    assert given["mask"].grid.matches(native.grid)
    assert np.isclose(found.mask.numpy().sum(), brain.sum(), rtol=0.02)  # both have voxels of 2 mm
    assert torch.equal(found.labels.data, 7 * found.mask.data) and float(found.tissue.max()) < 0.34
    assert np.array_equal(found.acpc_to_template.steps[0].matrix, given["start"])
    assert torch.equal(given["image"].data, found.image.data * found.mask.data)
    assert given["priors"].shape == (3, *found.image.grid.shape) and float(given["priors"].sum(0).max()) > 0.9
    assert float(given["rim"].data.sum()) > float(template.mask.data.sum())
