"""Report sections that concern the whole unit: summary, acquisition and quality metrics."""

from __future__ import annotations

import numpy as np

from dsiprep.data.results import Acquired, Blip, UnitResults
from dsiprep.errors import printable
from dsiprep.io.quality_columns import column_meaning
from dsiprep.report import plots
from dsiprep.report.nonlinearity_facts import nonlinearity_facts
from dsiprep.report.page_parts import Fact, FigureWriter, Picture, Section
from dsiprep.report.wording import (
    BLIPS,
    DISTORTION_METHODS,
    MOTION_MODELS,
    SIMILARITIES,
    STAGES,
    describe_grid,
    duration,
    encoding,
    number,
)


def _seconds_by_stage(seconds: dict[str, float]) -> tuple[tuple[str, float], ...]:
    """Seconds by stage; substages, such as the motion of each blip, are summed."""
    total: dict[str, float] = {}
    for name, value in seconds.items():
        label = STAGES.get(name.split("-")[0].split("_")[0], name)
        total[label] = total.get(label, 0.0) + value
    return tuple(total.items())


def summary(results: UnitResults, figures: FigureWriter) -> Section:
    """Input, processing steps, run time and key metrics."""
    return Section(
        "summary",
        "Summary",
        "Overview of the acquisition and processing.",
        facts=_summary_facts(results),
        notes=tuple(f"WARNING: {text}" for text in results.warnings),
        shares=_seconds_by_stage(results.seconds),
        tables=(("Key metrics", ("Metric", "Value", "Meaning"), _key_metrics(results)),),
    )


def _summary_facts(results: UnitResults) -> tuple[Fact, ...]:
    acquired, preprocessed = results.acquired, results.preprocessed
    models = dict.fromkeys(motion.model for motion in results.motions)
    correction = "not corrected"
    if results.distortion:
        correction = DISTORTION_METHODS.get(results.distortion.method, results.distortion.method)
    runs = len(results.unit.runs)
    return (
        Fact("Sampling scheme", acquired.scheme.description),
        Fact(
            "Volumes",
            f"{len(acquired.dwi)}, of which {int(acquired.dwi.is_b0.sum())} with b=0, "
            f"in {runs} run{'s' if runs > 1 else ''}",
        ),
        Fact("Acquisition grid", describe_grid(acquired.dwi.grid)),
        *(
            Fact(_phase_encoding_name(blip, len(acquired.blips)), encoding(blip.pe, blip.grid or acquired.dwi.grid))
            for blip in acquired.blips
        ),
        Fact("Denoising", results.denoised.method),
        Fact("Gibbs ringing", results.unringed.description),
        Fact("Head motion correction", " and ".join(MOTION_MODELS.get(model, model) for model in models)),
        Fact("Susceptibility distortion correction", correction),
        *nonlinearity_facts(results),
        Fact("Structural image", results.anatomy.modality),
        Fact("Template", results.anatomy.template if results.anatomy.acpc_to_template else "not normalised"),
        Fact(
            "Output grid",
            describe_grid(preprocessed.dwi.grid),
            "anterior-posterior commissure (ACPC) space; voxel axes point left, posterior and superior (LPS+)",
        ),
        Fact("Interpolation", preprocessed.interpolation),
        Fact("Device", results.device),
        Fact("Run time", duration(sum(results.seconds.values()))),
    )


def _phase_encoding_name(blip: Blip, count: int) -> str:
    """Name of the fact; it names the blip where there is more than one."""
    return f"Phase encoding, {BLIPS.get(blip.name, blip.name)}" if count > 1 else "Phase encoding"


def _key_metrics(results: UnitResults) -> tuple[tuple[str, str, str], ...]:
    """Rows of metric, value and meaning; metrics without a value are omitted."""
    table = results.quality.table
    outliers = sum(int(motion.outlier_slices.sum()) for motion in results.motions if motion.outlier_slices is not None)
    total = int(np.isfinite(results.quality.slice_z).sum())
    ndc = f"{number(table.get('raw_neighbor_corr'))} → {number(table.get('t1_neighbor_corr'))}"
    r2 = np.concatenate([motion.r2 for motion in results.motions]) if results.motions else np.array([np.nan])
    score = results.coregistration
    target = f"that of {score.target_unit}" if score.target_unit else "the structural image"
    rows = [
        (
            "Mean framewise displacement (FD)",
            f"{number(table.get('mean_fd'))} mm",
            "Average head movement between successive volumes",
        ),
        ("Maximum FD", f"{number(table.get('max_fd'))} mm", "Largest head movement between successive volumes"),
        (
            "Neighbouring DWI correlation (NDC), raw → preprocessed",
            ndc,
            "Mean correlation of each diffusion-weighted volume with its nearest neighbour in q-space. It increases "
            "with better alignment, but also with smoothing",
        ),
        ("Outlier slices", f"{outliers} of {total}", "Slices with signal dropout relative to their prediction"),
        (
            "Median R² of the prediction",
            f"{np.nanmedian(r2):.3f}",
            "How well the other volumes predict each volume",
        ),
        (
            f"{SIMILARITIES[score.metric]}, before → after coregistration",
            f"{number(score.score_before)} → {number(score.score_after)}",
            f"Similarity between the b=0 reference and {target}. Compare it only between subjects of the same study",
        ),
        (
            "Brain mask overlap",
            number(table.get("t1_dice_distance")),
            "Dice coefficient of the diffusion and structural brain masks; 1 is perfect overlap",
        ),
    ]
    return tuple(row for row in rows if "not available" not in row[1])


def acquisition(results: UnitResults, figures: FigureWriter) -> Section:
    """Input files and q-space sampling."""
    unit, acquired = results.unit, results.acquired
    rows = []
    for index, run in enumerate(unit.runs):
        volumes = int((acquired.dwi.run == index).sum())
        scale = acquired.scales[index] if index < len(acquired.scales) else 1.0
        rows.append((run.image.name, "DWI", encoding(run.pe, acquired.dwi.grid), str(volumes), f"{scale:.3f}"))
    grid = next((blip.grid for blip in acquired.blips if blip.grid), acquired.dwi.grid)
    rows += [(epi.image.name, "b=0 EPI", encoding(epi.pe, grid), "", "") for epi in unit.epis]
    modality = results.settings.anatomy.modality
    pictures = figures.single(
        "sampling",
        plots.sampling(acquired.dwi, acquired.scheme),
        f"q-space samples coloured by b-value: {acquired.scheme.description}.",
        "Top: q-space samples as acquired, coloured by b-value; |q| is proportional to √b. Bottom: b-values in "
        "order of acquisition.",
        "Where points overlap in a projection, the one with the lowest b-value is shown.",
    )
    drift = acquired.drift
    pictures += _drift_picture(acquired, figures)
    unused = tuple((printable(image.path.name), printable(image.reason)) for image in unit.left_out)
    rows += [(path.name, modality, "", "", "") for path in unit.structural(modality)]
    return Section(
        "acquisition",
        "Acquisition",
        "Input files that were processed together, and the q-space samples in scanner coordinates before any "
        "correction. Check that there are no gaps, that the full or half sphere is covered as intended, and that the "
        "b=0 volumes (▲) are distributed over the series.",
        pictures,
        notes=(*map(printable, unit.notes), *(drift.notes if drift is not None else ())),
        tables=(
            ("Input files", ("File", "Type", "Phase encoding", "Volumes", "Intensity scaling"), tuple(rows)),
            *((("Images of the subject that are not used", ("File", "Reason"), unused),) if unused else ()),
        ),
    )


def _drift_picture(acquired: Acquired, figures: FigureWriter) -> tuple[Picture, ...]:
    """Drift of the signal, if it was measured."""
    drift = acquired.drift
    if drift is None or not np.isfinite(drift.measured).any():
        return ()
    return figures.single(
        "signalDrift",
        plots.signal_drift(drift, acquired.dwi.run),
        "Signal of the brain over the scan, and the drift that was divided out.",
        "Signal of the brain in single volumes relative to the start of the run (points), and the drift that was "
        "divided out (line; at 1 where there was none of significance).",
    )


def quality(results: UnitResults, figures: FigureWriter) -> Section:
    """The row of image_qc.tsv, with the meaning of each column."""
    rows = []
    for name, value in results.quality.table.items():
        if value is None or name.endswith("_id") or name == "file_name":
            continue
        rows.append((name, number(value), column_meaning(name)))
    return Section(
        "quality",
        "Quality metrics",
        "The values reported in image_qc.tsv. Compare them only within one protocol and scanner: there are no "
        "universally valid thresholds.",
        notes=results.quality.notes,
        tables=(("image_qc.tsv", ("Column", "Value", "Meaning"), tuple(rows)),),
    )
