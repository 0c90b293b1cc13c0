"""The b=0 reference onto the structural image: phantom with a known pose, and what happens without a T1w."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dsiprep.data.grid import Volume
from dsiprep.data.results import Anatomy
from dsiprep.data.transform import Affine
from dsiprep.ops.image.affine import rigid_matrix
from dsiprep.settings import CoregisterSettings
from dsiprep.stages.coregister import coregister
from helpers.blob_images import GRID, blobs, error, far_pose, moved, volume


def anatomy(modality: str, matrix: np.ndarray) -> Anatomy:
    image = volume(blobs(0), (0.0, 0.25, 0.7, 1.0))
    mask = Volume((image.data > 0.1).float(), GRID)
    return Anatomy(modality, image, mask, None, Affine(matrix, "anat", "ACPC"), None, None, "none", None, None)


@pytest.mark.parametrize("header_agrees", [True, False])
def test_a_known_pose_is_found(header_agrees: bool) -> None:
    """The scanner's coordinates agree with the T1w's up to a small motion, or not at all."""
    pose = far_pose(3)
    near = rigid_matrix(np.array([0.02, -0.03, 0.01, 2, -1, 3])) @ pose
    dwiref = moved(volume(blobs(0), (0.02, 1.0, 0.45, 0.3)), pose, 0.03, (80, 90, 60))
    mask = Volume((dwiref.data > 0.2).float(), dwiref.grid)
    found = coregister(dwiref, mask, anatomy("T1w", near if header_agrees else np.eye(4)), CoregisterSettings(dof=6))
    assert error(found.dwiref_to_acpc.matrix, pose) < 0.5
    assert (found.dwiref_to_acpc.source, found.dwiref_to_acpc.target) == ("dwiref", "ACPC")
    assert found.score_after > found.score_before > 0.99 and found.metric == "mi"


def test_without_a_structural_image_the_way_to_acpc_is_the_answer() -> None:
    matrix = rigid_matrix(np.array([0.1, 0.2, 0.3, 4, 5, 6]))
    blank = Volume(torch.zeros(GRID.shape), GRID)
    found = coregister(blank, blank, anatomy("none", matrix), CoregisterSettings())
    np.testing.assert_array_equal(found.dwiref_to_acpc.matrix, matrix)
    assert found.metric == "none"


def test_another_b0_reference_is_found_from_afar() -> None:
    """Same contrast: two series of one person, 30 degrees and 50 mm apart."""
    pose, start = far_pose(5), rigid_matrix(np.array([0.1, -0.1, 0.05, 3, 8, -4]))
    lead = anatomy("none", start)
    lead = replace(lead, image=volume(blobs(0), (0.02, 1.0, 0.45, 0.3)))
    dwiref = moved(lead.image, pose @ start, 0.05, (80, 90, 60))
    mask = Volume((dwiref.data > 0.2).float(), dwiref.grid)
    found = coregister(dwiref, mask, lead, CoregisterSettings(), "sub-01_acq-first")
    assert error(found.dwiref_to_acpc.matrix, pose @ start) < 0.5
    assert found.metric == "cc" and found.led_by == "sub-01_acq-first"
    assert found.score_before < 0.7 < 0.9 < found.score_after
