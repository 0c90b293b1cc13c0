"""Line plots of the report."""

from __future__ import annotations

from dataclasses import replace

from dsiprep.data.results import UnitResults
from dsiprep.report import plots


def test_poses_by_iteration_follow_the_trace(subject: UnitResults) -> None:
    poses = plots.poses_by_iteration(subject.motions[0].trace)
    assert [iteration for iteration, _ in poses] == [1, 2, 3, 4]
    assert poses[0][1].shape == (len(subject.motions[0].volumes), 6)


def test_tick_labels_are_not_rounded(subject: UnitResults) -> None:
    rotations_only = [row | {"shiftX": 0.0, "shiftY": 0.0, "shiftZ": 0.0} for row in subject.motions[0].trace]
    motion = replace(subject.motions[0], trace=rotations_only)
    bvals = subject.acquired.dwi.bvals[motion.volumes]
    assert b">0.0001<" in plots.motion_convergence(motion, bvals, bvals == 0)
