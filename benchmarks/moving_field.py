"""A field that changes with the head, on phantoms with known truth: `python benchmarks/moving_field.py OUT`.

A third of the volumes of each phantom is turned by up to 8 degrees about each axis. In one, the field changes by 1 mm
at 6 degrees of pitch or roll (in 5 % of the brain by more); in the other it moves rigidly with the head. Each is
preprocessed with --moving-field off, then auto from the stored stages, and points of the brain in the raw volumes are
compared with the truth, those of turned volumes relative to volumes at rest. CPU seconds of auto are what it adds.
"""

from __future__ import annotations

import argparse
import json
import resource
from pathlib import Path

from dsiprep.cli.app import main as run
from dsiprep.phantom import PhantomSettings, make_phantom
from dsiprep.score import score

MAX_MOTION_MM = 8 / 1.8  # rotations are bounded by 1.8 degrees per mm
SHOWN = ("turned volumes", "moving field", "combined: error", "motion: displacement")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--schemes", nargs="+", default=["dsi101", "multishell"])
    parser.add_argument("--resolution", type=float, default=3.0, help="voxel size of the series in mm")
    parser.add_argument("--sizes", type=float, nargs="+", default=[1.0, 0.0], help="change of the field in mm")
    parser.add_argument("--seed", type=int, default=5)
    options = parser.parse_args()
    table: dict[str, dict[str, float]] = {}
    for scheme in options.schemes:
        for size in options.sizes:
            phantom = options.out / f"{scheme}-{size:g}"
            if not phantom.exists():
                settings = PhantomSettings(
                    scheme=scheme, resolution=options.resolution, moved=0.3, max_motion=MAX_MOTION_MM,
                    moving_field=size, ideal=False, seed=options.seed,
                )  # fmt: skip
                make_phantom(phantom, settings)
            for method in ("off", "auto"):
                name = f"{scheme}, {size:g} mm, {method}"
                table[name] = _measure(phantom, options.out / name.replace(", ", "-").replace(" ", ""), method, options)
                print(name, json.dumps(table[name]), flush=True)
    (options.out / "moving_field.json").write_text(json.dumps(table, indent=1) + "\n")


def _measure(phantom: Path, out: Path, method: str, options: argparse.Namespace) -> dict[str, float]:
    """Scores that the change of the field affects, and CPU seconds of the run."""
    arguments = [str(phantom / "bids"), str(out), "participant", "--output-resolution", f"{options.resolution:g}"]
    arguments += ["--denoise-method", "none", "--unringing-method", "none", "-w", str(phantom / "work"), "--keep-work"]
    start = _cpu_seconds()
    if run([*arguments, "--skip-anat-based-spatial-normalization", "--moving-field", method]):
        raise SystemExit(f"{out}: preprocessing failed")
    values = {"CPU s": round(_cpu_seconds() - start, 1)}
    for entry in score(out, phantom / "truth"):
        if entry.value is not None and entry.name.startswith(SHOWN):
            values[entry.name] = round(entry.value, 3)
    return values


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


if __name__ == "__main__":
    main()
