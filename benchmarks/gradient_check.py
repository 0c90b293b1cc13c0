"""The b-table check on real people and phantoms: `python benchmarks/gradient_check.py [--quick] BIDS [BIDS ...]`.

For each series: the answer for the b-vectors as given and for each of the 23 other flips and permutations of their
rows, and how often the correction restores the given ones. Then the answers for reduced series: random directions (6 to
12), half of the brain, noise of 5 % of the b=0 signal added. A wrong answer for right b-vectors, and "right" for wrong
ones, are errors. The b-vectors of the datasets are taken as right.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dsiprep.data.qspace import GradientCheck
from dsiprep.data.results import Acquired
from dsiprep.io.bids import find_units, read_unit
from dsiprep.io.gradients import fsl_axes
from dsiprep.ops.qspace.fibre_continuity import axis_frames
from dsiprep.settings import Settings
from dsiprep.stages.acquisition import conform
from dsiprep.stages.gradient_check import check_gradients, with_corrected_gradients

REDUCED = 6  # series of each kind
NOISE = 0.05  # of the b=0 signal


def check(series: Acquired) -> GradientCheck:
    return check_gradients(series, fsl_axes(series.dwi.grid))


def in_frame(series: Acquired, frame: np.ndarray) -> Acquired:
    """The series with the rows of its b-vector file turned by `frame`."""
    axes = fsl_axes(series.dwi.grid)
    return replace(series, dwi=replace(series.dwi, bvecs=series.dwi.bvecs @ (axes @ frame @ axes.T).T))


def same_axes(one: np.ndarray, other: np.ndarray) -> bool:
    return bool((np.abs(np.sum(one * other, 1)) > 1 - 1e-6)[np.linalg.norm(one, axis=1) > 0].all())


def reduced(series: Acquired, kind: str, rng: np.random.Generator) -> Acquired:
    """Fewer directions, half of the brain, or more noise."""
    dwi, mask = series.dwi, series.mask
    if kind == "directions":
        count, weighted = int(rng.integers(6, 13)), np.flatnonzero(~dwi.is_b0)
        kept = np.sort(
            np.concatenate([np.flatnonzero(dwi.is_b0), rng.choice(weighted, min(count, len(weighted)), False)])
        )
        return replace(series, dwi=dwi.select(kept))
    if kind == "half brain":
        axis, inside = int(rng.integers(3)), mask.data > 0.5
        centre = int(np.median(np.nonzero(inside.numpy())[axis]))
        part = torch.zeros_like(inside)
        side = slice(centre, None) if rng.random() < 0.5 else slice(None, centre)
        part[tuple(side if a == axis else slice(None) for a in range(3))] = True
        return replace(series, mask=replace(mask, data=(inside & part).float()))
    b0 = float(dwi.data[torch.as_tensor(dwi.is_b0)].mean(0)[mask.data > 0.5].mean())
    noise = torch.as_tensor(rng.normal(0, NOISE * b0, (2, *dwi.data.shape)), dtype=torch.float32)
    return replace(series, dwi=dwi.with_data(((dwi.data + noise[0]) ** 2 + noise[1] ** 2).sqrt()))


def all_series(roots: list[str]) -> Iterator[tuple[str, Acquired]]:
    for root in roots:
        for unit in find_units(Path(root), Settings()):
            name = f"{Path(root).parent.name if Path(root).name == 'bids' else Path(root).name}/{unit.name}"
            yield name, conform(read_unit(unit, Settings()), Settings().acquisition)


def main() -> None:
    quick = "--quick" in sys.argv
    totals: dict[str, Counter[str]] = {}
    rng = np.random.default_rng(0)
    for name, series in all_series([argument for argument in sys.argv[1:] if not argument.startswith("-")]):
        start = time.process_time()
        given = check(series)
        seconds = time.process_time() - start
        answers, restored = Counter(), 0
        for frame in axis_frames()[1 : 4 if quick else None]:
            wrong = in_frame(series, frame)
            found = check(wrong)
            answers[found.answer] += 1
            restored += same_axes(with_corrected_gradients(wrong, found).dwi.bvecs, series.dwi.bvecs)
        print(
            f"{name}: given {given.answer} (ratio {given.ratio:.2f}, z {given.z:.1f}, {seconds:.1f} CPU s, "
            f"signal falls with b {given.order:.1%}); others {dict(answers)}, restored {restored}",
            flush=True,
        )
        for kind in ("directions", "half brain", "noise"):
            count = totals.setdefault(kind, Counter())
            for _ in range(2 if quick else REDUCED):
                part = reduced(series, kind, rng)
                count[check(part).answer] += 1
                frame = axis_frames()[int(rng.integers(1, 24))]
                count[f"wrong frame: {check(in_frame(part, frame)).answer}"] += 1
    for kind, count in totals.items():
        print(f"reduced, {kind}: {dict(count)}")


if __name__ == "__main__":
    main()
