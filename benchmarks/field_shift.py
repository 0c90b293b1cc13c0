"""Head motion told from shifts by the field: `python benchmarks/field_shift.py OUT BVAL BVEC`.

Phantoms with 30 % of the volumes moved: DSI-257 at 4 mm and the table of the two FSL files at 3 mm, with eddy currents
of up to 2 mm and their constant term of up to 3 mm, and a centre frequency that drifts by 2 mm over the series; and
the same two without either. Prints, over the diffusion-weighted volumes and the brain, the mean displacement by wrong
poses and by wrong eddy currents and drift, and by both. Poses are those relative to the median of the b=0 volumes, as
the reference has it; no offset is taken out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from dsiprep.cli.tools import main as tools
from dsiprep.io.bids import find_units, read_unit
from dsiprep.ops.motion.poses import median_pose
from dsiprep.phantom.scanner import eddy_basis
from dsiprep.settings import Settings
from dsiprep.stages.acquisition import conform
from dsiprep.stages.motion import estimate_motion

FIXED = ["--no-ideal", "--distortion", "0", "--t1w-resolution", "4", "--moved", "0.3"]
FIELDS = {"none": [], "eddy currents and drift": ["--eddy", "2", "--eddy-constant", "3", "--drift", "2"]}


def measure(folder: Path) -> tuple[float, float, float]:
    """Mean errors in mm of poses, of eddy currents with drift, and of both together."""
    settings = Settings()
    acquired = conform(read_unit(find_units(folder / "bids", settings)[0], settings), settings.acquisition)
    dwi, pe = acquired.dwi, acquired.blips[0].pe
    found = estimate_motion(dwi, acquired.mask, settings.motion, pe, acquired.multiband)
    points = dwi.grid.to_world(np.argwhere(found.mask.numpy() > 0.5)[::40])
    truth = json.loads((folder / "truth" / "truth.json").read_text())
    poses = np.asarray(truth["head_to_scanner"])
    poses = poses @ np.linalg.inv(median_pose(poses[dwi.is_b0], points.mean(axis=0)))
    there, own = (np.einsum("nab,mb->nma", p[:, :3, :3], points) + p[:, None, :3, 3] for p in (poses, found.transforms))
    axis = dwi.grid.directions[:, pe.axis]
    field = np.stack([eddy_basis(x) @ c for x, c in zip(there, np.asarray(truth["eddy_mm"]), strict=True)])
    field -= np.median(field[dwi.is_b0].mean(axis=1))
    eddy = found.eddy
    bent = (
        np.zeros_like(field) if eddy is None else np.stack([eddy.displacement(v, x) @ axis for v, x in enumerate(own)])
    )
    wrong = (own - there, (bent - field)[..., None] * axis, own - there + (bent - field)[..., None] * axis)
    errors = [float(np.linalg.norm(e[~dwi.is_b0], axis=-1).mean()) for e in wrong]
    return errors[0], errors[1], errors[2]


def main(out: Path, bval: Path, bvec: Path) -> None:
    """One row per scheme and field."""
    print("| scheme | field | motion | eddy currents and drift | both |\n|---|---|---|---|---|")
    for scheme, size in (("dsi257", "4"), (f"{bval},{bvec}", "3")):
        for name, options in FIELDS.items():
            folder = out / f"{Path(scheme).stem.replace(',', '_')}_{name.replace(' ', '_')}"
            if not (folder / "truth" / "truth.json").is_file():
                tools(["phantom", str(folder), "--scheme", scheme, "--resolution", size, *FIXED, *options])
            errors = measure(folder)
            print(f"| {Path(scheme).stem} | {name} | " + " | ".join(f"{e:.2f}" for e in errors) + " |", flush=True)


if __name__ == "__main__":
    main(*(Path(argument).resolve() for argument in sys.argv[1:4]))
