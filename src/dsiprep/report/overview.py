"""The cards that are about everything: summary, acquisition, quality table."""

from __future__ import annotations

import numpy as np

from dsiprep.data.results import UnitResults
from dsiprep.report import plots
from dsiprep.report.page_parts import Album, Fact, Section
from dsiprep.report.wording import (
    BLIPS,
    METHODS,
    MODELS,
    SCORES,
    STAGES,
    duration,
    encoding,
    in_words,
    number,
)


def _stages(seconds: dict[str, float]) -> tuple[tuple[str, float], ...]:
    """Seconds by stage, with the parts of one stage (motion of each blip) added up."""
    total: dict[str, float] = {}
    for name, value in seconds.items():
        label = STAGES.get(name.split("-")[0].split("_")[0], name)
        total[label] = total.get(label, 0.0) + value
    return tuple(total.items())


def _notes(results: UnitResults) -> tuple[str, ...]:
    """What the stages have to tell, each with the stage's name."""
    stages = {
        "Head motion": [note for motion in results.motions for note in motion.notes],
        "Distortion": list(results.distortion.notes) if results.distortion else [results.distortion_reason],
        "Anatomy": list(results.anatomy.notes),
        "Coregistration": list(results.coregistration.notes),
        "Quality": list(results.quality.notes),
    }
    return tuple(f"{stage}: {note}" for stage, notes in stages.items() for note in notes)


def summary(results: UnitResults, album: Album) -> Section:
    """What was done, how long it took, and the numbers people ask for first."""
    acquired, out = results.acquired, results.preprocessed
    models = dict.fromkeys(motion.model for motion in results.motions)
    corrected = METHODS.get(results.distortion.method, results.distortion.method) if results.distortion else "not done"
    seconds = sum(results.seconds.values())
    facts = (
        Fact("Sampling", acquired.scheme.description),
        Fact(
            "Volumes",
            f"{len(acquired.dwi)} ({int(acquired.dwi.is_b0.sum())} b=0) in {len(results.unit.runs)} run(s)",
        ),
        Fact("Acquired grid", in_words(acquired.dwi.grid)),
        *(
            Fact(f"Phase encoding, {BLIPS.get(blip.name, blip.name)}", encoding(blip.pe, acquired.dwi.grid))
            for blip in acquired.blips
        ),
        Fact("Denoising", results.denoised.method),
        Fact("Head motion", " and ".join(MODELS.get(model, model) for model in models)),
        Fact("Distortion", corrected),
        Fact("Structural image", results.anatomy.modality),
        Fact("Template", results.anatomy.template if results.anatomy.acpc_to_template else "not normalised"),
        Fact(
            "Output grid",
            f"{in_words(out.dwi.grid)}, ACPC space, LPS+",
        ),
        Fact("Interpolation", out.interpolation),
        Fact("Computed on", results.device),
        Fact("Wall time", duration(seconds)),
    )
    return Section(
        "summary",
        "Summary",
        "What was acquired and what was done to it. Nothing here is a verdict: look at the pictures below "
        "before you use the data, and read the notes first.",
        facts=facts,
        notes=_notes(results),
        shares=_stages(results.seconds),
        tables=(("Numbers to begin with", ("Measure", "Value", "What it means"), _headline(results)),),
    )


def _headline(results: UnitResults) -> tuple[tuple[str, ...], ...]:
    table = results.quality.table
    flagged = sum(int(motion.outlier_slices.sum()) for motion in results.motions if motion.outlier_slices is not None)
    total = int(np.isfinite(results.quality.slice_z).sum())
    ndc = f"{number(table.get('raw_neighbor_corr'))} → {number(table.get('t1_neighbor_corr'))}"
    r2 = np.concatenate([motion.r2 for motion in results.motions]) if results.motions else np.array([np.nan])
    score = results.coregistration
    rows = [
        (
            "Mean FD",
            f"{number(table.get('mean_fd'))} mm",
            "Head movement from one volume to the next, on average",
        ),
        ("Largest FD", f"{number(table.get('max_fd'))} mm", "The largest single movement"),
        (
            "Neighbouring-DWI correlation, raw → out",
            ndc,
            "Likeness of volumes with neighbouring q-vectors; rises as volumes come to lie on each other, "
            "but with smoothing too",
        ),
        ("Slices that lost signal", f"{flagged} of {total}", "Slices far darker than the other volumes predict them"),
        (
            "Median R² with the prediction",
            f"{np.nanmedian(r2):.3f}",
            "How well each volume follows from all others",
        ),
        (
            f"Coregistration ({SCORES[score.metric].lower()})",
            f"{number(score.score_before)} → {number(score.score_after)}",
            f"Agreement of b=0 and {'b=0 of ' + score.led_by if score.led_by else 'structural image'} before and "
            "after; compare it between your own subjects",
        ),
        (
            "Mask overlap",
            number(table.get("t1_dice_distance")),
            "Dice of the DWI and structural brain masks, 1 is equal",
        ),
    ]
    return tuple(row for row in rows if "not available" not in row[1])


def acquisition(results: UnitResults, album: Album) -> Section:
    """Which files were put together, and where they sample q-space."""
    unit, acquired = results.unit, results.acquired
    rows = []
    for index, run in enumerate(unit.runs):
        volumes = int((acquired.dwi.run == index).sum())
        scale = acquired.scales[index] if index < len(acquired.scales) else 1.0
        rows.append((run.image.name, "DWI", encoding(run.pe, acquired.dwi.grid), str(volumes), f"{scale:.3f}"))
    rows += [(epi.image.name, "EPI reference", encoding(epi.pe, acquired.dwi.grid), "", "") for epi in unit.epis]
    modality = results.settings.anatomy.modality
    rows += [(path.name, modality, "", "", "") for path in unit.structural(modality)]
    return Section(
        "acquisition",
        "Acquisition",
        "The files that were processed together, and the points of q-space they sample, in scanner axes "
        "before any correction. Look for gaps, for a missing half of the sphere, and for b=0 volumes (▲) "
        "spread over the series.",
        album.still(
            "sampling",
            plots.sampling(acquired.dwi, acquired.scheme),
            f"Points of q-space coloured by b-value: {acquired.scheme.description}.",
            "q-space as acquired, coloured by b-value; |q| is proportional to √b. Below: b-values in "
            "order of acquisition.",
            "Where points hide behind each other, the one of lowest b is shown.",
        ),
        notes=unit.notes,
        tables=(("Files", ("File", "Kind", "Phase encoding", "Volumes", "Scaled by"), tuple(rows)),),
    )


MEANINGS = {
    "neighbor_corr": "Correlation of volumes with neighbouring q-vectors",
    "masked_neighbor_corr": "The same inside the brain mask",
    "dwi_contrast": "Likeness of neighbouring over likeness of perpendicular volumes",
    "num_bad_slices": "Slices that fall out of line with their neighbours",
    "coherence_index": "How far fibre directions agree with the next voxel's; falls where b-vectors are wrong",
    "num_directions": "Diffusion-weighted volumes",
    "max_b": "Largest b-value, s/mm²",
    "mean_fd": "Mean framewise displacement, mm",
    "max_fd": "Largest framewise displacement, mm",
    "max_rotation": "Largest rotation from the reference",
    "max_translation": "Largest translation from the reference, mm",
    "max_rel_rotation": "Largest rotation between volumes that follow each other",
    "max_rel_translation": "Largest translation between volumes that follow each other, mm",
    "t1_dice_distance": "Dice overlap of DWI and structural brain mask",
    "mni_dice_distance": "Dice overlap of normalised and template brain mask",
}


def quality(results: UnitResults, album: Album) -> Section:
    """The row of image_qc.tsv with meanings."""
    rows = []
    for name, value in results.quality.table.items():
        if value is None or name.endswith("_id") or name == "file_name":
            continue
        stem = name.removeprefix("raw_").removeprefix("t1_") if name not in MEANINGS else name
        where = {"raw": "as acquired", "t1": "preprocessed"}.get(name.split("_")[0], "") if name not in MEANINGS else ""
        meaning = MEANINGS.get(stem, "")
        rows.append((name, number(value), f"{meaning}, {where}" if meaning and where else meaning))
    return Section(
        "quality",
        "Quality table",
        "The row of image_qc.tsv. Compare these numbers within one protocol and one scanner; they have no "
        "limits that hold everywhere.",
        notes=results.quality.notes,
        tables=(("image_qc.tsv", ("Column", "Value", "Meaning"), tuple(rows)),),
    )
