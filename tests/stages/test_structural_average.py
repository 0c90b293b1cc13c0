"""Average of structural images, and brain masks given by the user."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dsiprep.data.acquisition import Unit
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.template import Template
from dsiprep.errors import InputError, SettingsError
from dsiprep.io.user_mask import find_mask
from dsiprep.ops.image.affine import rigid_matrix
from dsiprep.ops.image.interpolation import resample_onto
from dsiprep.plan import check_anatomy
from dsiprep.settings import AnatomySettings, Settings
from dsiprep.stages.structural_average import _average, average_images
from dsiprep.stages.structural_brain import check_user_mask
from helpers.blob_images import GRID, blob_labels, image_of
from helpers.grids import make_grid

MOVED = rigid_matrix(np.array([0.12, -0.08, 0.1, 6.0, -4.0, 8.0]), GRID.centre)


def scan(image: Volume, matrix: np.ndarray, seed: int, scale: float = 1.0) -> Volume:
    """The image with its head moved by `matrix`, noise and scaled intensity, on a different grid."""
    grid = make_grid("LAS", (70, 80, 66), (2.5, 2.4, 2.6))
    data = resample_onto(image.data[None], GRID, grid, np.linalg.inv(matrix), cubic=True)[0]
    noise = np.random.default_rng(seed).normal(0, 0.03, grid.shape).astype(np.float32)
    return Volume((data + torch.from_numpy(noise)).abs() * scale, grid)


@pytest.fixture(scope="module")
def head() -> Volume:
    return image_of(blob_labels(0), (0.0, 0.25, 0.7, 1.0))


@pytest.fixture(scope="module")
def pair(head: Volume) -> tuple[Volume, Volume]:
    return scan(head, np.eye(4), 1), scan(head, MOVED, 2, 3.0)


def max_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Largest distance in mm between the images of head points under two matrices."""
    corners = GRID.centre + 60 * np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    difference = (first - second)[:3]
    return float(np.linalg.norm(corners @ difference[:, :3].T + difference[:, 3], axis=1).max())


def test_unbiased_space_is_midway(pair: tuple[Volume, Volume]) -> None:
    """Both images move by half the transform between them, regardless of their order."""
    average, poses, notes = average_images(pair, unbiased=True)
    first, second = (pose.matrix for pose in poses)
    assert max_distance(second @ np.linalg.inv(first), MOVED) < 0.3
    assert max_distance(np.linalg.inv(first), second) < 0.6  # opposite halves, about the centre of the head
    assert abs(max_distance(first, np.eye(4)) - max_distance(second, np.eye(4))) < 0.6
    assert "midway" in notes[0]
    _, swapped, _ = average_images(pair[::-1], unbiased=True)
    assert max_distance(swapped[0].matrix, second) < 0.3
    assert max_distance(swapped[1].matrix, first) < 0.3
    assert average.grid.shape == pair[0].grid.shape


def test_first_lex_keeps_the_space_of_the_first_image(pair: tuple[Volume, Volume], head: Volume) -> None:
    average, poses, _ = average_images(pair, unbiased=False)
    np.testing.assert_array_equal(poses[0].matrix, np.eye(4))
    assert max_distance(poses[1].matrix, MOVED) < 0.3
    assert average.grid.matches(pair[0].grid)
    clean = (
        scan(head, np.eye(4), 1).numpy() * 0 + resample_onto(head.data[None], GRID, average.grid, cubic=True)[0].numpy()
    )
    inside = clean > 0.2
    assert np.std((average.numpy() - clean)[inside]) < 0.85 * np.std((pair[0].numpy() - clean)[inside])


def test_average_excludes_outliers_in_one_of_three_images(head: Volume) -> None:
    rng, identity = np.random.default_rng(0), np.tile(np.eye(4), (3, 1, 1))
    noise = torch.from_numpy(rng.normal(0, 0.03, (3, *GRID.shape)).astype(np.float32))
    dropout = (slice(25, 35), slice(30, 45), slice(20, 35))
    scans = head.data + noise
    scans[2][dropout] = 0
    average = _average([Volume(data, GRID) for data in scans], identity, GRID)
    error = (average.data - head.data).abs()
    assert float(error[dropout].mean()) < 0.03 < 0.2 * float((scans.mean(0) - head.data).abs()[dropout].mean())
    assert float(error.mean()) < 0.02


def test_constant_image_raises_an_error() -> None:
    blank = Volume(torch.zeros(GRID.shape), GRID)
    with pytest.raises(InputError, match="same value"):
        average_images((blank,), unbiased=True)


def template_with(mask: Volume) -> Template:
    return Template("Own", mask, mask, None, "test")


def test_user_mask_is_used_or_rejected(head: Volume) -> None:
    """Masks on any grid are accepted; implausible ones are rejected with an explanation."""
    mask = Volume((head.data > 0.2).float(), GRID)
    same_grid = check_user_mask(mask, head, template_with(mask))
    assert torch.equal(same_grid.data, mask.data)
    finer = GRID.at_spacing(2.0)
    other = Volume((resample_onto(mask.data[None], GRID, finer)[0] > 0.5).float(), finer)
    resampled = check_user_mask(other, head, template_with(mask))
    both = float((resampled.data * mask.data).sum())
    assert 2 * both / float(resampled.data.sum() + mask.data.sum()) > 0.97
    shifted = GRID.affine.copy()
    shifted[:3, 3] += 90
    cases = {
        "empty": Volume(mask.data * 0, GRID),
        "lies inside the structural image": Volume(mask.data, Grid(GRID.shape, shifted)),
        "ml, the brain of Own": Volume(mask.data * (torch.arange(GRID.shape[2]) > 48), GRID),
    }
    for message, wrong in cases.items():
        with pytest.raises(InputError, match=message):
            check_user_mask(wrong, head, template_with(mask))


def test_user_mask_path_is_resolved(tmp_path: Path) -> None:
    unit = Unit("01", "a", "sub-01_ses-a", ())
    file = tmp_path / "sub-01_brain.nii.gz"
    file.touch()
    assert find_mask(unit, AnatomySettings()) is None
    assert find_mask(unit, AnatomySettings(mask=str(file))) == file
    assert find_mask(unit, AnatomySettings(mask=f"{tmp_path}/sub-{{subject}}_brain.nii.gz")) == file
    with pytest.raises(InputError, match="no such file"):
        find_mask(unit, AnatomySettings(mask=f"{tmp_path}/sub-{{subject}}_ses-{{session}}.nii.gz"))
    with pytest.raises(InputError, match="braces"):
        find_mask(unit, AnatomySettings(mask=f"{tmp_path}/{{who}}.nii.gz"))


def test_user_mask_is_found_in_derivatives(tmp_path: Path) -> None:
    unit, folder = Unit("01", "a", "sub-01_ses-a", ()), tmp_path / "sub-01" / "ses-a" / "anat"
    folder.mkdir(parents=True)
    (folder / "sub-01_ses-a_space-MNI152NLin2009cAsym_desc-brain_mask.nii.gz").touch()
    with pytest.raises(InputError, match="found: sub-01_ses-a_space-MNI152NLin2009cAsym"):
        find_mask(unit, AnatomySettings(mask=str(tmp_path)))
    own = folder / "sub-01_ses-a_desc-brain_mask.nii.gz"
    own.touch()
    assert find_mask(unit, AnatomySettings(mask=str(tmp_path))) == own
    other = tmp_path / "sub-01" / "ses-b" / "anat" / "sub-01_ses-b_desc-brain_mask.nii.gz"
    other.parent.mkdir(parents=True)
    other.touch()
    with pytest.raises(InputError, match="several"):
        find_mask(unit, AnatomySettings(mask=str(tmp_path)))
    assert find_mask(unit, AnatomySettings(mask=str(tmp_path), reference="sessionwise")) == own


def test_one_mask_file_for_several_subjects_is_rejected(tmp_path: Path) -> None:
    file = tmp_path / "mask.nii.gz"
    file.touch()
    units = [Unit(label, None, f"sub-{label}", (), t1w=(Path("T1w.nii.gz"),)) for label in ("01", "02")]
    settings = Settings(anatomy=AnatomySettings(mask=str(file), template="MNI152NLin2009aSym"))
    with pytest.raises(SettingsError, match="several subjects"):
        check_anatomy(units, settings)
    check_anatomy(units[:1], settings)
    pattern = replace(settings, anatomy=replace(settings.anatomy, mask=f"{tmp_path}/{{subject}}.nii.gz"))
    with pytest.raises(InputError, match=r"01.nii.gz: there is no such file"):
        check_anatomy(units, pattern)
