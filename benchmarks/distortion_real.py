"""Distortion fields of a real person against each other: `python benchmarks/distortion_real.py SUBJECT_DIR`.

The subject has whole series of both polarities (dir-AP, dir-PA), a phase-difference fieldmap and a T1w. The field of
the pair is held against the fieldmap, and so is what a structural image adds to it (`--structural`) and what the
program `unpile` makes of one polarity and the T1w (`--unpile`). One Markdown table is printed: correlation, mean and
95th percentile of the difference in mm in the brain, the same less its median, and CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dsiprep.data.acquisition import GreFieldmap, PhaseEncoding
from dsiprep.data.results import Blip, Distortion
from dsiprep.engines.unpile import correct_without_fieldmap
from dsiprep.io.fieldmaps import read_fieldmap
from dsiprep.io.nifti import read_volume
from dsiprep.ops.mask import brain_mask_b0
from dsiprep.pair import correct_pair
from dsiprep.stages.fieldmap import correct_with_fieldmap


def main() -> None:
    """Fields, table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("subject", type=Path)
    parser.add_argument("--structural", action="store_true", help="the pair with the T1w, too")
    parser.add_argument("--unpile", action="store_true", help="AP with the T1w by unpile, too (a minute)")
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
    if options.unpile:
        blip, b0, mask = Blip("only", pe, torch.zeros(0)), pair.before[0], brain_mask_b0(pair.before[0])
        alone, seconds = timed(
            lambda: correct_without_fieldmap(blip, b0.data[None], b0.grid, mask, read_volume(t1w), True)
        )
        row("unpile, AP and T1w, against pair", implied(alone, mm), known, brain, seconds)
        row("unpile, AP and T1w, against fieldmap", implied(alone, mm), reference, brain, seconds)


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
