"""What each round of SHORELine buys: `python benchmarks/iterations.py OUT [CASE ...]`.

The phantoms of benchmarks/shoreline.py, with 1, 2, 3 and 4 rounds at most. One Markdown row per case and bound:
RMSE over b > 100 and three axes less one common offset, mean displacement of brain points, CPU
time.
"""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from shoreline import CASES, errors

BOUNDS = (1, 2, 3, 4)
DEFAULT = ["dsi257 30 % moved", "hasc55 50 % moved"]
ALL = {**CASES, "dsi257 30 % moved": ["--moved", "0.3"]}


def rows(name: str, folder: Path) -> None:
    """Print the rows of one case."""
    from dsiprep.io.bids import find_units, read_unit
    from dsiprep.settings import Settings
    from dsiprep.stages.acquisition import conform
    from dsiprep.stages.motion import estimate_motion

    settings = Settings()
    acquired = conform(read_unit(find_units(folder / "bids", settings)[0], settings), settings.acquisition)
    truth = json.loads((folder / "truth" / "truth.json").read_text())
    poses = np.asarray(truth["head_to_scanner"])
    true = poses @ np.linalg.inv(poses[0])
    points = acquired.mask.grid.to_world(np.argwhere(acquired.mask.numpy() > 0.5)[::200])
    one = replace(settings.motion, iters=1)  # compiled before anything is timed
    estimate_motion(acquired.dwi, acquired.mask, one, acquired.blips[0].pe, acquired.multiband)
    for bound in BOUNDS:
        start = resource.getrusage(resource.RUSAGE_SELF)
        wanted = replace(settings.motion, iters=bound)
        found = estimate_motion(acquired.dwi, acquired.mask, wanted, acquired.blips[0].pe, acquired.multiband)
        end = resource.getrusage(resource.RUSAGE_SELF)
        cpu = end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime
        row = errors(found.transforms, true, acquired.dwi.bvals, points)
        kept = [row[key] for key in ("rotation deg", "translation mm", "displacement mm")]
        print(f"| {name} | {bound} | {' | '.join(kept)} | {cpu:.0f} |", flush=True)


def main(out: Path, names: list[str]) -> None:
    """All rows."""
    from dsiprep.cli.tools import main as tools

    print("| phantom | rounds at most | rotation deg | translation mm | displacement mm | CPU s |\n" + "|---" * 6 + "|")
    for name in names or DEFAULT:
        folder = out / name.replace(" ", "_").replace("%", "pc").replace(",", "")
        if not (folder / "truth" / "truth.json").is_file():
            tools(["phantom", str(folder), "--no-ideal", "--distortion", "0", *ALL[name]])
        rows(name, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
