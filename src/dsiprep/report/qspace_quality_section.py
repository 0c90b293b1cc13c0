"""Report sections on the check of the b-table and on the signal of the samples in q-space."""

from __future__ import annotations

import numpy as np

from dsiprep.data.qspace import Lattice
from dsiprep.data.results import UnitResults
from dsiprep.report import qspace_plots
from dsiprep.report.page_parts import Fact, FigureWriter, Section
from dsiprep.stages.gradient_check import doubt_gradients

ANSWERS = {
    "right": "the b-vectors fit the brain",
    "wrong": "the b-vectors do NOT fit the brain",
    "undecided": "undecided",
}


def gradients(results: UnitResults, figures: FigureWriter) -> Section:
    """Whether the b-table fits the brain."""
    check, title = results.gradients, "b-table check"
    if check is None:
        return Section("gradients", title, "The b-table was not compared with the images: disabled.")
    lead = (
        "Streamlines through the directions of diffusion tensors are longest if the b-vectors are right. They were "
        "compared with the 23 other flips and permutations of the rows x, y and z of the .bvec before any correction."
    )
    pictures = figures.single(
        "frames",
        qspace_plots.frame_lengths(check),
        "Bar chart of the mean streamline length for 24 flips and permutations of the b-vectors.",
        "Mean streamline length for each flip and permutation of the rows of the .bvec.",
        "The bar of the given b-vectors should be clearly the highest. In sparse or noisy series, bars are equal.",
    )
    facts = [Fact("Answer", ANSWERS[check.answer], check.why or _margin(check.ratio, check.z))]
    facts.append(
        Fact("Signal falls with b", f"{check.order:.1%}", "of pairs of volumes whose b-values are clearly apart")
    )
    return Section("gradients", title, lead, pictures, tuple(facts), doubt_gradients(check))


def _margin(ratio: float, z: float) -> str:
    return (
        f"streamlines {ratio:.2f} times as long as in the best other frame, {abs(z):.1f} standard errors apart; "
        "an answer takes a factor of 1.2 and 3.5 standard errors"
    )


def qspace_quality(results: UnitResults, figures: FigureWriter) -> Section:
    """Signal, noise floor, places of the samples, and the series on the lattice."""
    quality, dwi, title = results.quality.qspace, results.preprocessed.dwi, "Signal in q-space"
    if quality is None:
        return Section(
            "qspace-signal", title, "There are too few diffusion-weighted volumes to predict one from the others."
        )
    lead = (
        "Each preprocessed volume is one sample of q-space, predicted from all others. Where the head turned, samples "
        "of a lattice have left their places, and reconstruction that takes them for a lattice is wrong."
    )
    pictures = figures.single(
        "qspaceSignal",
        qspace_plots.signal_and_places(quality, dwi.bvals, dwi.is_b0),
        "Signal, error of prediction and distance from the lattice of each sample against the length of q.",
        "Signal of each volume in the brain (median; line: 10th to 90th percentile) with the mean of pure noise; "
        "error of its prediction from the others; and its distance from its lattice point, for schemes on a lattice.",
        "Signal at the noise floor holds no information. Single volumes far above the others in the middle are lost "
        "or misaligned. Beyond half a step (red), a sample is nearer to another lattice point.",
    )
    offset = quality.offset[np.isfinite(quality.offset)]
    facts = [Fact("Samples at the noise floor", f"{quality.at_floor:.0%}", "at high b, below two standard deviations")]
    if len(offset):
        facts += [
            Fact("Distance from the lattice", f"mean {offset.mean():.2f}, maximum {offset.max():.2f} steps"),
            Fact("Lattice points lost", f"{quality.lost} of {quality.prescribed}", "no sample within half a step"),
        ]
    if quality.antipodal is not None:
        facts.append(Fact("Antipodal samples", f"{quality.antipodal:.2f}", "RMS difference over that of noise alone"))
    if results.lattice is not None:
        facts += _lattice_facts(results.lattice)
    return Section("qspace-signal", title, lead, pictures, tuple(facts))


def _lattice_facts(lattice: Lattice) -> list[Fact]:
    beyond = int(lattice.extrapolated.sum())
    error = float(np.sqrt(np.mean(lattice.left_out**2))) / lattice.noise
    return [
        Fact("Series on a lattice", f"{len(lattice.dwi)} volumes", lattice.model),
        Fact("Extrapolated points", str(beyond), "outside the acquired q-space, or less certain than a volume"),
        Fact("Error of left-out volumes", f"{error:.2f}", "RMS, in units of the noise of the preprocessed series"),
    ]
