"""Distortion fields of a real person against each other: `python benchmarks/distortion_real.py SUBJECT_DIR`.

The subject has whole series of both polarities (dir-AP, dir-PA), a phase-difference fieldmap and a T1w. The field of
the pair is held against the fieldmap, and so are what a structural image adds to it (`--structural`) and what one
polarity and the T1w tell without a fieldmap (`--fieldmapless`), beside the program `unpile` where `--unpile` says where
it is. One Markdown table is printed: correlation, mean and 95th percentile of the difference in mm in the brain, the
same less its median, and CPU seconds (of the distortion alone, not of the anatomy that it starts from).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from dsiprep.api.blip_pair import correct_pair
from dsiprep.data.acquisition import GreFieldmap, PhaseEncoding
from dsiprep.data.grid import Volume
from dsiprep.data.results import Anatomy, Blip, Coregistration, Distortion
from dsiprep.io.fieldmaps import read_fieldmap
from dsiprep.io.nifti import read_volume, write_image
from dsiprep.io.templates import load_template
from dsiprep.ops.image.interpolation import resample_onto
from dsiprep.ops.intensity.brain_mask import brain_mask_b0
from dsiprep.settings import AnatomySettings, CoregisterSettings
from dsiprep.stages.anatomy import process_anatomy
from dsiprep.stages.coregister import coregister
from dsiprep.stages.fieldmap import correct_with_fieldmap
from dsiprep.stages.fieldmapless import correct_without_fieldmap


def main() -> None:
    """Fields, table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("subject", type=Path)
    parser.add_argument("--structural", action="store_true", help="the pair with the T1w, too")
    parser.add_argument("--fieldmapless", action="store_true", help="AP with the tissues of the T1w, too")
    parser.add_argument("--unpile", type=Path, metavar="FILE", help="the program, for AP with the T1w (a minute)")
    options = parser.parse_args()
    subject, name = options.subject, options.subject.name
    ap, pa = (subject / "dwi" / f"{name}_dir-{d}_dwi.nii.gz" for d in ("AP", "PA"))
    t1w = subject / "anat" / f"{name}_T1w.nii.gz"
    pair, seconds = timed(lambda: correct_pair(ap, pa))
    brain = brain_mask_b0(pair.dwiref).numpy() > 0.5
    told = json.loads(ap.with_name(f"{name}_dir-AP_dwi.json").read_text())
    pe = PhaseEncoding.from_bids(told["PhaseEncodingDirection"], told["TotalReadoutTime"])
    mm = float(pair.dwiref.grid.voxel_sizes[pe.axis]) * float(pe.readout_time or 0)
    gre = measured(subject, name, pair, pe)
    known, reference = implied(pair, mm), implied(gre, mm)
    print("| | r | mean mm | p95 mm | mean, free | p95, free | CPU s |\n|---|---|---|---|---|---|---|")
    row("no correction against the pair", np.zeros_like(known), known, brain, 0)
    row("pair against fieldmap", known, reference, brain, seconds)
    inside = [volume.numpy()[brain] for volume in pair.after]
    print(f"corrected AP and PA: r {np.corrcoef(*inside)[0, 1]:.4f}")
    if options.structural:
        helped, seconds = timed(lambda: correct_pair(ap, pa, structural=t1w))
        row("pair with T1w (AP) against fieldmap", implied(helped, mm), reference, brain, seconds)
    if options.fieldmapless or options.unpile:
        b0 = pair.before[0]
        mask, anatomy = brain_mask_b0(b0), seen(t1w)
        start = coregister(b0, mask, anatomy, CoregisterSettings())
        alone, seconds = timed(lambda: correct_without_fieldmap(pe, b0, mask, anatomy, start))
        both = {"AP and tissues of the T1w": (implied(alone, mm), seconds)}
        if options.unpile:
            both["AP and T1w by unpile"] = unpile(options.unpile, b0, mask, anatomy, start, pe)
        for name, (found, cost) in both.items():
            row(f"{name}, against pair", found, known, brain, cost)
            row(f"{name}, against fieldmap", found, reference, brain, cost)


def seen(t1w: Path) -> Anatomy:
    """The T1w as the pipeline sees it."""
    settings = AnatomySettings()
    template = load_template(settings.template, settings.modality)
    return process_anatomy((read_volume(t1w),), None, None, template, settings)


def unpile(
    program: Path, b0: Volume, mask: Volume, anatomy: Anatomy, start: Coregistration, pe: PhaseEncoding
) -> tuple[np.ndarray, float]:
    """Displacement in mm by local correlation with the T1w's brain, inverted; the settings that were best here."""
    inside = anatomy.mask.data > 0.5
    inverted = (anatomy.image.data[inside].quantile(0.99) - anatomy.image.data).clamp(min=0) * inside
    there = resample_onto(inverted[None], anatomy.image.grid, b0.grid, np.linalg.inv(start.dwiref_to_acpc.matrix))[0]
    before = sum(os.times()[:4])
    with TemporaryDirectory() as place:
        files = {name: Path(place) / f"{name}.nii.gz" for name in ("epi", "reference", "mask")}
        for name, data in {"epi": b0.data, "reference": there, "mask": mask.data}.items():
            write_image(files[name], data, b0.grid)
        given = [word for name, path in files.items() for word in (f"--{name}", str(path))]
        subprocess.run(
            [program, "--threads", "2", "fit", *given, "--pe-dir", pe.direction, "--total-readout-time",
             str(pe.readout_time), "--metric", "lncc", "--levels", "24,12,6", "--iters", "30", "--lam-mm", "60",
             "--out", f"{place}/out"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        hertz = read_volume(Path(place) / "out" / "field_hz.nii.gz").numpy()
    return hertz * float(b0.grid.voxel_sizes[pe.axis]) * float(pe.readout_time or 0), sum(os.times()[:4]) - before


def measured(subject: Path, name: str, pair: Distortion, pe: PhaseEncoding) -> Distortion:
    """AP corrected by the phase-difference fieldmap."""
    phase, magnitude = (subject / "fmap" / f"{name}_{kind}.nii.gz" for kind in ("phasediff", "magnitude1"))
    told = json.loads((subject / "fmap" / f"{name}_phasediff.json").read_text())
    fieldmap = read_fieldmap(GreFieldmap("phasediff", (phase,), magnitude, told["EchoTime2"] - told["EchoTime1"]))
    b0 = pair.before[0]
    return correct_with_fieldmap(Blip("only", pe, torch.zeros(0)), b0.data[None], b0.grid, brain_mask_b0(b0), fieldmap)


def implied(result: Distortion, mm: float) -> np.ndarray:
    """Displacement of blip-up in mm along the phase-encoding axis, as the first blip of a result has it."""
    field = result.fields[0]
    axis = int(np.argmax([float(component.abs().max()) for component in field.data]))
    sign = np.sign(np.corrcoef(field.data[axis].numpy().ravel(), result.fieldmap_hz.numpy().ravel())[0, 1])
    return sign * field.data[axis].numpy()


def timed(function: Callable[[], Distortion]) -> tuple[Distortion, float]:
    """A result, and the CPU seconds of this process and its children."""
    before = sum(os.times()[:4])
    start = time.perf_counter()
    result = function()
    print(f"({time.perf_counter() - start:.0f} s of wall time)", flush=True)
    return result, sum(os.times()[:4]) - before


def row(title: str, found: np.ndarray, known: np.ndarray, brain: np.ndarray, seconds: float) -> None:
    """One line of the table."""
    error = (found - known)[brain]
    r = np.corrcoef(found[brain], known[brain])[0, 1] if found.any() else float("nan")
    free = np.abs(error - np.median(error))
    numbers = [r, np.abs(error).mean(), np.percentile(np.abs(error), 95), free.mean(), np.percentile(free, 95), seconds]
    print(f"| {title} | " + " | ".join(f"{v:.3g}" for v in numbers) + " |", flush=True)


if __name__ == "__main__":
    main()
