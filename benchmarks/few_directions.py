"""SHORELine with few directions on phantoms: `python benchmarks/few_directions.py OUT BVAL BVEC`.

Phantoms of 3 mm with the table of the two FSL files, two subjects each: lying still, restless (0.2 mm and 0.36 degrees
from volume to volume), restless and with eddy currents of up to 2 mm, and with 20 % of the volumes moved. Prints the
mean displacement of brain points by motion and eddy currents together, over b > 100 and less what all volumes have in
common: as it was, and what is left with the model that is taken by itself and with the tensor.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from dsiprep.cli.tools import main as tools
from dsiprep.data.acquisition import PhaseEncoding
from dsiprep.data.grid import Grid
from dsiprep.data.transform import EddyCurrents
from dsiprep.io.bids import find_units, read_unit
from dsiprep.phantom.scanner import eddy_basis
from dsiprep.settings import Settings
from dsiprep.stages.acquisition import conform
from dsiprep.stages.motion import estimate_motion

STILL = ["--moved", "0", "--max-motion", "0"]
CASES = {
    "still": STILL,
    "restless": [*STILL, "--jitter", "0.2"],
    "restless, eddy currents": [*STILL, "--jitter", "0.1", "--eddy", "2"],
    "20 % moved": ["--moved", "0.2"],
}
SUBJECTS = ("1", "2")


def displaced(points: np.ndarray, poses: np.ndarray, eddy: EddyCurrents | None) -> np.ndarray:
    """Where points of the head (m, 3) are found in each volume, (n, m, 3)."""
    at = np.einsum("nab,mb->nma", poses[:, :3, :3], points) + poses[:, None, :3, 3]
    return at if eddy is None else at + np.stack([eddy.displacement(v, x) for v, x in enumerate(at)])


def truly(points: np.ndarray, truth: dict, grid: Grid, pe: PhaseEncoding) -> np.ndarray:
    """The same from the phantom's own account."""
    poses = np.asarray(truth["head_to_scanner"])
    at = displaced(points, poses @ np.linalg.inv(poses[0]), None)
    along = np.stack([eddy_basis(x) @ c for x, c in zip(at, np.asarray(truth["eddy_mm"]), strict=True)])
    return at + along[..., None] * grid.directions[:, pe.axis]


def left(found: np.ndarray, true: np.ndarray) -> float:
    """Mean distance in mm less the displacement that all volumes have in common."""
    away = found - true
    return float(np.linalg.norm(away - away.mean(axis=0), axis=-1).mean())


def measure(folder: Path) -> list[float]:
    """As it was, with the model that is taken by itself, with the tensor."""
    settings = Settings()
    acquired = conform(read_unit(find_units(folder / "bids", settings)[0], settings), settings.acquisition)
    dwi, pe = acquired.dwi, acquired.blips[0].pe
    points = dwi.grid.to_world(np.argwhere(acquired.mask.numpy() > 0.5)[::50])
    weighted = dwi.bvals > 100
    true = truly(points, json.loads((folder / "truth" / "truth.json").read_text()), dwi.grid, pe)[weighted]
    row = [left(points[None], true)]
    for model in ("auto", "tensor"):
        found = estimate_motion(dwi, acquired.mask, replace(settings.motion, model=model), pe, acquired.multiband)
        row.append(left(displaced(points, found.transforms, found.eddy)[weighted], true))
    return row


def main(out: Path, bval: Path, bvec: Path) -> None:
    """One row per case, subjects side by side."""
    print("| phantom | as it was | by itself | tensor |\n|---|---|---|---|")
    for name, options in CASES.items():
        rows = []
        for seed in SUBJECTS:
            folder = out / f"{name.replace(' ', '_').replace('%', 'pc').replace(',', '')}_{seed}"
            if not (folder / "truth" / "truth.json").is_file():
                fixed = ["--no-ideal", "--distortion", "0", "--resolution", "3", "--t1w-resolution", "4"]
                tools(["phantom", str(folder), "--scheme", f"{bval},{bvec}", *fixed, "--seed", seed, *options])
            rows.append(measure(folder))
        cells = [" / ".join(f"{value:.2f}" for value in column) for column in zip(*rows, strict=True)]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), Path(sys.argv[3]).resolve())
