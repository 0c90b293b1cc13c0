"""Verdicts: faults planted into results are found, and every verdict has a reason, a bound and a source."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.qspace import GradientCheck
from dsiprep.data.results import UnitResults
from dsiprep.errors import SettingsError
from dsiprep.report import series_checks, verdicts
from dsiprep.report.verdict_bounds import Bound, read_bounds
from dsiprep.report.verdicts import BAD, CHECKS, FINE, LOOK, STATES, UNKNOWN, Verdict, judge


def by_key(results: UnitResults, bounds: Path | str = "") -> dict[str, Verdict]:
    return {verdict.key: verdict for verdict in judge(results, read_bounds(bounds))}


def moved(volume: Volume, millimetres: tuple[float, float, float]) -> Volume:
    affine = volume.grid.affine.copy()
    affine[:3, 3] += millimetres
    return Volume(volume.data, Grid(volume.grid.shape, affine))


@pytest.fixture(scope="module")
def clean(subject: UnitResults) -> dict[str, Verdict]:
    return by_key(subject)


def test_every_verdict_has_a_reason_and_a_source_and_the_worst_come_first(subject: UnitResults) -> None:
    found = judge(subject, read_bounds())
    assert {verdict.key for verdict in found} == {check.key for check in CHECKS}
    order = [STATES.index(verdict.state) for verdict in found]
    assert order == sorted(order)
    for verdict in found:
        assert verdict.reason.endswith(".")
        assert len(verdict.source) > 10
        assert (verdict.value is None) == (verdict.state == UNKNOWN)


def test_every_check_has_bounds_and_every_bound_a_check() -> None:
    assert set(read_bounds()) == {check.key for check in CHECKS}


def test_a_shift_of_the_reference_is_measured_in_mm(subject: UnitResults, clean: dict[str, Verdict]) -> None:
    assert clean["coregistration"].state == FINE
    off = replace(subject.preprocessed, dwiref=moved(subject.preprocessed.dwiref, (0.0, 10.0, 0.0)))
    verdict = by_key(replace(subject, preprocessed=off))["coregistration"]
    assert verdict.state == BAD
    assert verdict.value == pytest.approx(10, abs=2)


@pytest.mark.parametrize("shift", [(6.0, 0.0, 0.0), (0.0, -5.0, 4.0), (3.0, 3.0, 3.0)])
def test_the_best_match_is_found_at_the_shift_that_was_made(
    subject: UnitResults, shift: tuple[float, float, float]
) -> None:
    anatomy = subject.anatomy
    distance, found = series_checks.best_offset(anatomy.image, moved(anatomy.image, shift), anatomy.mask)
    assert found == pytest.approx(shift, abs=0.75)
    assert distance == pytest.approx(np.linalg.norm(shift), abs=0.75)


def test_a_mask_that_cuts_the_brain_is_found(subject: UnitResults, clean: dict[str, Verdict]) -> None:
    assert clean["mask_cut"].state == FINE
    mask = subject.preprocessed.mask
    cut = mask.data.clone()
    cut[:, :, int(0.7 * cut.shape[2]) :] = 0
    result = replace(subject.preprocessed, mask=Volume(cut, mask.grid))
    verdict = by_key(replace(subject, preprocessed=result))["mask_cut"]
    assert verdict.state == BAD
    small = Volume(subject.anatomy.mask.data * (torch.arange(subject.anatomy.mask.grid.shape[2]) < 22), mask.grid)
    small = Volume(small.data, subject.anatomy.mask.grid)
    assert by_key(replace(subject, anatomy=replace(subject.anatomy, mask=small)))["mask_volume"].state in (LOOK, BAD)


def test_truncated_k_space_is_seen_and_noise_is_not_taken_for_it(subject: UnitResults) -> None:
    rng = np.random.default_rng(0)
    fine = np.zeros((128, 128, 12))
    x, y = np.meshgrid(np.arange(128) - 63.5, np.arange(128) - 63.5, indexing="ij")
    fine[np.hypot(x / 50, y / 58) < 1] = 600.0
    fine[np.hypot(x / 18, y / 24) < 1] = 1400.0
    averaged = fine.reshape(64, 2, 64, 2, 12).mean((1, 3))
    spectrum = np.fft.fftshift(np.fft.fft2(fine, axes=(0, 1)), axes=(0, 1))[32:96, 32:96]
    truncated = np.abs(np.fft.ifft2(np.fft.ifftshift(spectrum, axes=(0, 1)), axes=(0, 1))) / 4
    grid = Grid((64, 64, 12), np.diag([3.0, 3.0, 3.0, 1.0]))
    mask = Volume(torch.as_tensor((averaged > 300).astype(np.float32)), grid)
    found = {}
    for name, image in (("averaged", averaged), ("truncated", truncated)):
        noisy = image + rng.normal(0, 15, image.shape)
        dwi = DWI(torch.as_tensor(noisy[None], dtype=torch.float32), grid, np.zeros(1), np.zeros((1, 3)),
                  np.zeros(1, int), np.zeros(1, int))  # fmt: skip
        found[name] = series_checks.ringing(dwi, mask, 2)
    bounds = read_bounds()["ringing"]
    assert bounds.look is not None
    assert found["averaged"] < bounds.look < found["truncated"]


def test_dropout_motion_and_noise_are_judged_by_their_metrics(subject: UnitResults) -> None:
    lost = [replace(motion, outlier_slices=np.abs(motion.slice_z) > 0.8) for motion in subject.motions]
    noise = subject.denoised.noise
    assert noise is not None
    faulty = replace(
        subject,
        motions=tuple(lost),
        quality=replace(subject.quality, table={**subject.quality.table, "mean_fd": 3.2}),
        denoised=replace(subject.denoised, noise=Volume(noise.data * 20, noise.grid)),
    )
    found = by_key(faulty)
    assert found["outlier_slices"].state == found["mean_fd"].state == found["snr"].state == BAD
    assert "3.2 mm, above 2 mm" in found["mean_fd"].reason


def test_the_answer_of_the_b_table_check_is_the_verdict(subject: UnitResults) -> None:
    check = GradientCheck("right", "", "", np.eye(3), (), 1.5, 7.0, 1.0, ())
    states = {}
    for answer, ratio in (("right", 1.5), ("wrong", 0.7), ("undecided", 0.99)):
        found = by_key(replace(subject, gradients=replace(check, answer=answer, ratio=ratio)))
        states[answer] = found["b_table"].state
    assert states == {"right": FINE, "wrong": BAD, "undecided": UNKNOWN}
    assert by_key(replace(subject, gradients=None))["b_table"].state == UNKNOWN


def test_a_check_that_fails_is_told_and_does_not_stop_the_others(
    subject: UnitResults, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(results: UnitResults) -> verdicts.Measured:
        raise ZeroDivisionError("no voxels")

    monkeypatch.setattr(verdicts, "CHECKS", (replace(CHECKS[0], measure=failing), *CHECKS[1:]))
    found = by_key(subject)
    assert found["mean_fd"].state == UNKNOWN
    assert "ZeroDivisionError: no voxels" in found["mean_fd"].reason
    assert found["max_fd"].state == FINE


@pytest.mark.parametrize(("method", "state"), [("auto", LOOK), ("none", UNKNOWN)])
def test_uncorrected_distortion_is_looked_at_unless_it_was_disabled(
    subject: UnitResults, method: str, state: str
) -> None:
    reason = "Distortion is not corrected: there is only one phase encoding."
    settings = replace(subject.settings, distortion=replace(subject.settings.distortion, method=method))
    found = by_key(replace(subject, settings=settings, distortion=None, distortion_reason=reason))["distortion"]
    assert (found.state, found.reason) == (state, reason)


def test_a_laboratory_changes_bounds_in_a_file(subject: UnitResults, tmp_path: Path) -> None:
    file = tmp_path / "bounds.toml"
    file.write_text('[mean_fd]\nlook = 0.1\nbad = 0.2\nsource = "our pilot study"\n')
    found = by_key(subject, file)
    assert (found["mean_fd"].state, found["mean_fd"].source) == (BAD, "our pilot study")
    assert found["max_fd"].look == read_bounds()["max_fd"].look


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[mean_fd\n", "not a TOML file"),
        ("[motion]\nlook = 1\n", "unknown check motion"),
        ('[mean_fd]\nlook = "high"\n', "must be numbers"),
        ("[mean_fd]\nhigh = 2\n", "may hold look, bad, source only"),
    ],
)
def test_a_file_of_bounds_that_is_wrong_is_refused_with_a_sentence(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "bounds.toml"
    file.write_text(content)
    with pytest.raises(SettingsError, match=message):
        read_bounds(file)
    with pytest.raises(SettingsError, match="No such file"):
        read_bounds(tmp_path / "missing.toml")


def test_bounds_may_be_left_out(subject: UnitResults) -> None:
    found = judge(subject, {"mean_fd": Bound(None, None, "no bound")})
    assert [(verdict.key, verdict.state) for verdict in found] == [("mean_fd", FINE)]
