"""Verdicts on a series: each check as fine, look, bad or not measured, with figure, bound, source and picture."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import numpy as np

from dsiprep.data.results import UnitResults
from dsiprep.report import series_checks
from dsiprep.report.verdict_bounds import Bound

LOG = logging.getLogger(__name__)
FINE, LOOK, BAD, UNKNOWN = "fine", "look", "bad", "not measured"
STATES = (BAD, LOOK, UNKNOWN, FINE)  # in the order in which they are shown
BRAIN_ML = (900.0, 1900.0)
AXES = {"x": "left-right", "y": "posterior-anterior", "z": "inferior-superior"}


@dataclass(frozen=True)
class Measured:
    """What a check found: its value in the unit of the check, and a remark; without a value, the reason for that.

    `state` is the verdict where there is no value to judge.
    """

    value: float | None
    remark: str = ""
    state: str = UNKNOWN


@dataclass(frozen=True)
class Check:
    """One check of a series.

    Attributes
    ----------
    key : str
        Name in the file of bounds.
    title : str
    unit : str
        Of the value: "mm", "%", or empty for a ratio.
    larger_is_worse : bool
    section : str
        Key of the section of the report that the check belongs to.
    figure : str
        Start of the name of the picture to look at; empty for the whole section.
    advice : str
        What to do if the check is not fine.
    measure : callable
    """

    key: str
    title: str
    unit: str
    larger_is_worse: bool
    section: str
    figure: str
    advice: str
    measure: Callable[[UnitResults], Measured]


@dataclass(frozen=True)
class Verdict:
    """The outcome of a check; `state` is one of `STATES`, and `reason` is a sentence that is never empty."""

    key: str
    title: str
    state: str
    value: float | None
    unit: str
    look: float | None
    bad: float | None
    source: str
    reason: str
    advice: str
    section: str
    figure: str

    @property
    def shown_value(self) -> str:
        """The value with its unit."""
        return "" if self.value is None else f"{self.value:.3g}{' ' * bool(self.unit)}{self.unit}"

    def as_record(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def _mean_fd(results: UnitResults) -> Measured:
    value = results.quality.table.get("mean_fd")
    return Measured(value) if isinstance(value, float) else Measured(None, "There is one volume per run.")


def _max_fd(results: UnitResults) -> Measured:
    fd = np.asarray(results.quality.confounds.get("framewise_displacement", []), float)
    if not np.isfinite(fd).any():
        return Measured(None, "There is one volume per run.")
    return Measured(
        float(np.nanmax(fd)),
        f"volume {int(np.nanargmax(fd))}; {int((fd > 0.5).sum())} of {len(fd)} volumes above 0.5 mm",
    )


def _outlier_slices(results: UnitResults) -> Measured:
    lost = [motion.outlier_slices for motion in results.motions if motion.outlier_slices is not None]
    count = sum(int(slices.sum()) for slices in lost)
    total = int(np.isfinite(results.quality.slice_z).sum())
    if not lost or not total:
        return Measured(None, "Without a signal model no slice can be compared with its prediction.")
    handled = "replaced" if results.settings.motion.outliers == "replace" else "reported, not replaced"
    return Measured(100 * count / total, f"{count} of {total} slices, {handled}")


def _snr(results: UnitResults) -> Measured:
    value = series_checks.b0_signal_to_noise(results.acquired, results.denoised)
    return Measured(value, "" if value else "The noise was not estimated, because denoising is off or found no noise.")


def _noise_floor(results: UnitResults) -> Measured:
    value = series_checks.noise_floor_ratio(results.acquired, results.denoised)
    highest = f"at b {results.acquired.dwi.bvals.max():.0f}, as acquired"
    return Measured(value, highest if value else "The noise was not estimated, because denoising is off.")


def _ringing(results: UnitResults) -> Measured:
    axis = results.motions[0].slice_axis if results.motions else 2
    value = series_checks.ringing(results.unringed.dwi, results.acquired.mask, axis)
    if value is None:
        return Measured(None, "The b=0 image has no strong edges.")
    left = ", left after its removal" if results.unringed.applied else ""
    return Measured(value, f"oscillation over height of the edges of b=0{left}")


def _b_table(results: UnitResults) -> Measured:
    check = results.gradients
    if check is None:
        return Measured(None, "The check is switched off.")
    if check.answer == "undecided":
        return Measured(None, check.why or "Streamlines tell too little; see the section.")
    return Measured(1 / check.ratio, "streamline length with the best other axes over that with those given")


def _coregistration(results: UnitResults) -> Measured:
    found = series_checks.coregistration_offset(results.preprocessed, results.anatomy)
    if found is None:
        return Measured(None, "There is no structural image.")
    score = results.coregistration
    similarity = f"similarity {score.score_before:.3f} → {score.score_after:.3f}"
    return Measured(found[0], f"distance from the best match with the structural image; {similarity}")


def _coverage(results: UnitResults) -> Measured:
    value, ml = (results.quality.table.get(f"uncovered_brain_{name}") for name in ("fraction", "ml"))
    if not isinstance(value, float) or not isinstance(ml, float):
        return Measured(None, "There is no structural image to compare the field of view with.")
    return Measured(100 * value, f"{ml:.0f} ml are outside the series")


def _mask_cut(results: UnitResults) -> Measured:
    value = series_checks.brain_signal_outside(results.preprocessed)
    return Measured(value, "" if value is not None else "There are no volumes between b 700 and 3000.")


def _mask_volume(results: UnitResults) -> Measured:
    if results.anatomy.magnification != 1:
        return Measured(None, "The head is not that of a human.")
    ml = series_checks.mask_millilitres(results.anatomy.mask)
    low, high = BRAIN_ML
    outside = max(low - ml, ml - high, 0.0) / (low if ml < low else high)
    return Measured(100 * outside, f"outside the plausible range; {ml:.0f} ml")


def _distortion(results: UnitResults) -> Measured:
    if results.distortion is None:
        disabled = results.settings.distortion.method == "none"
        return Measured(None, results.distortion_reason, UNKNOWN if disabled else LOOK)
    value = series_checks.phase_encoding_misfit(results.distortion, results.motions[0].mask)
    if value is None:
        return Measured(None, "There is one phase encoding, so that nothing can be compared.")
    return Measured(value, "difference between the phase encodings, after over before")


def _convergence(results: UnitResults) -> Measured:
    value = series_checks.still_moving(results.motions)
    return Measured(value, "" if value is not None else "Fewer than two rounds were recorded.")


def _negative_r2(results: UnitResults) -> Measured:
    r2 = np.concatenate([motion.r2 for motion in results.motions])
    weighted = np.concatenate([~results.acquired.dwi.is_b0[motion.volumes] for motion in results.motions])
    r2 = r2[weighted & np.isfinite(r2)]
    if not len(r2):
        return Measured(None, "Without a signal model there are no predictions.")
    negative = int((r2 < 0).sum())
    return Measured(100 * negative / len(r2), f"{negative} of {len(r2)} volumes, median R² {np.median(r2):.2f}")


def _normalisation(results: UnitResults) -> Measured:
    value = results.quality.table.get("mni_dice_distance")
    if not isinstance(value, float):
        return Measured(None, "The structural image was not normalised.")
    return Measured(value, f"overlap of the brain with that of {results.anatomy.template}")


CHECKS = (
    Check("mean_fd", "Mean framewise displacement", "mm", True, "motion", "motion",
          "Compare the mean images before and after realignment.", _mean_fd),
    Check("max_fd", "Largest movement between volumes", "mm", True, "motion", "motion",
          "See whether the volumes around it are aligned.", _max_fd),
    Check("outlier_slices", "Slices with signal dropout", "%", True, "motion", "slices",
          "Use --outliers replace, or leave the volumes out.", _outlier_slices),
    Check("convergence", "Volumes still moving in the last round", "%", True, "motion", "convergence",
          "Raise --shoreline-iters.", _convergence),
    Check("negative_r2", "Volumes that are not predicted", "%", True, "motion", "convergence",
          "Inspect these volumes, or leave them out.", _negative_r2),
    Check("snr", "Signal-to-noise ratio of b=0", "", False, "denoising", "denoise",
          "Expect noisy results at high b-values.", _snr),
    Check("noise_floor", "Highest b-values over the noise floor", "", False, "denoising", "denoise",
          "Models that fit magnitudes are biased there.", _noise_floor),
    Check("ringing", "Gibbs ringing", "", True, "denoising", "denoise",
          "Look for stripes parallel to the ventricles and the edge of the brain.", _ringing),
    Check("distortion", "Distortion correction", "", True, "distortion", "sdc",
          "Check PhaseEncodingDirection in the sidecars.", _distortion),
    Check("coregistration", "Coregistration", "mm", True, "coregistration", "coreg",
          "Compare the outlines in both images.", _coregistration),
    Check("coverage", "Brain outside the field of view", "%", True, "output", "means",
          "Regions outside the series have no data.", _coverage),
    Check("mask_cut", "Brain-like signal outside the brain mask", "%", True, "output", "means",
          "Give a better mask with --anat-mask.", _mask_cut),
    Check("mask_volume", "Volume of the brain", "%", True, "anatomy", "anat",
          "Check the outline of the brain; give a better mask with --anat-mask.", _mask_volume),
    Check("normalisation", "Overlap with the template", "", False, "anatomy", "template",
          "Compare the two frames of the picture.", _normalisation),
    Check("b_table", "Orientation of the b-table", "", True, "gradients", "frames",
          "Correct the b-vectors of the raw data.", _b_table),
)  # fmt: skip


def judge(results: UnitResults, bounds: Mapping[str, Bound]) -> tuple[Verdict, ...]:
    """Verdicts on one series, the worst first.

    Parameters
    ----------
    results : UnitResults
    bounds : mapping
        From `read_bounds`; a check without an entry is not judged.
    """
    verdicts = [_verdict(check, _measure(check, results), bounds[check.key]) for check in CHECKS if check.key in bounds]
    return tuple(sorted(verdicts, key=lambda verdict: STATES.index(verdict.state)))


def _measure(check: Check, results: UnitResults) -> Measured:
    try:
        return check.measure(results)
    except Exception as error:  # a check that fails must not cost the page, and it must be seen
        LOG.exception("%s: check '%s' failed", results.unit.name, check.key)
        return Measured(None, f"The check failed ({type(error).__name__}: {error}).")


def _verdict(check: Check, found: Measured, bound: Bound) -> Verdict:
    value = found.value if found.value is not None and np.isfinite(found.value) else None
    state = found.state if value is None else _state(check, value, bound)
    return Verdict(
        check.key, check.title, state, value, check.unit, bound.look, bound.bad, bound.source,
        _reason(check, state, value, bound, found.remark), check.advice, check.section, check.figure,
    )  # fmt: skip


def _state(check: Check, value: float, bound: Bound) -> str:
    for state, limit in ((BAD, bound.bad), (LOOK, bound.look)):
        if limit is not None and (value > limit if check.larger_is_worse else value < limit):
            return state
    return FINE


def _reason(check: Check, state: str, value: float | None, bound: Bound, remark: str) -> str:
    """A sentence with the value and the bound that decided."""
    if value is None:
        return remark or "There is no value."
    unit = f"{' ' * bool(check.unit)}{check.unit}"
    limits = {BAD: bound.bad, LOOK: bound.look, FINE: bound.look if bound.look is not None else bound.bad}
    limit, beyond = limits[state], "above" if check.larger_is_worse else "below"
    text = f"{value:.3g}{unit}"
    if limit is not None:
        text += f", {'not ' if state == FINE else ''}{beyond} {limit:g}{unit}"
    return f"{text} ({remark})." if remark else f"{text}."
