"""Coregistration of a phantom with a known pose, with and without a structural image."""

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
from helpers.blob_images import GRID, blob_labels, image_of, large_pose, max_error, moved


def make_anatomy(modality: str, matrix: np.ndarray) -> Anatomy:
    image = image_of(blob_labels(0), (0.0, 0.25, 0.7, 1.0))
    mask = Volume((image.data > 0.1).float(), GRID)
    return Anatomy(modality, image, mask, None, Affine(matrix, "anat", "ACPC"), None, None, "none", None, None)


@pytest.mark.parametrize("header_agrees", [True, False])
def test_known_pose_is_recovered(header_agrees: bool) -> None:
    """Scanner coordinates agree with those of the T1w up to a small motion, or not at all."""
    pose = large_pose(3)
    near = rigid_matrix(np.array([0.02, -0.03, 0.01, 2, -1, 3])) @ pose
    dwiref = moved(image_of(blob_labels(0), (0.02, 1.0, 0.45, 0.3)), pose, 0.03, (80, 90, 60))
    mask = Volume((dwiref.data > 0.2).float(), dwiref.grid)
    result = coregister(
        dwiref, mask, make_anatomy("T1w", near if header_agrees else np.eye(4)), CoregisterSettings(dof=6)
    )
    assert max_error(result.dwiref_to_acpc.matrix, pose) < 0.5
    assert (result.dwiref_to_acpc.source, result.dwiref_to_acpc.target) == ("dwiref", "ACPC")
    assert result.score_after > result.score_before > 0.99
    assert result.metric == "mi"


def test_without_structural_image_the_acpc_transform_is_returned() -> None:
    matrix = rigid_matrix(np.array([0.1, 0.2, 0.3, 4, 5, 6]))
    blank = Volume(torch.zeros(GRID.shape), GRID)
    result = coregister(blank, blank, make_anatomy("none", matrix), CoregisterSettings())
    np.testing.assert_array_equal(result.dwiref_to_acpc.matrix, matrix)
    assert result.metric == "none"


def test_known_pose_between_b0_references_is_recovered() -> None:
    """Two series of one subject with the same contrast, 30 degrees and 50 mm apart."""
    pose, start = large_pose(5), rigid_matrix(np.array([0.1, -0.1, 0.05, 3, 8, -4]))
    target = make_anatomy("none", start)
    target = replace(target, image=image_of(blob_labels(0), (0.02, 1.0, 0.45, 0.3)))
    dwiref = moved(target.image, pose @ start, 0.05, (80, 90, 60))
    mask = Volume((dwiref.data > 0.2).float(), dwiref.grid)
    result = coregister(dwiref, mask, target, CoregisterSettings(), "sub-01_acq-first")
    assert max_error(result.dwiref_to_acpc.matrix, pose @ start) < 0.5
    assert result.metric == "cc"
    assert result.target_unit == "sub-01_acq-first"
    assert result.score_before < 0.7 < 0.9 < result.score_after
