"""Gradient nonlinearity on phantoms with known truth: `python benchmarks/gradient_nonlinearity.py OUT`.

For each size of the nonlinearity, a phantom with motion and distortion is preprocessed with the coefficients and without
them, and once more without nonlinearity, for what the other errors are. Noise is left out, so that what remains is the
geometry. Prints the position of points of the T1w in the raw volumes, b-values and directions.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dsiprep.cli.app import main as run
from dsiprep.phantom import PhantomSettings, make_phantom
from dsiprep.score import score

SIZES_MM = (0.0, 1.5, 5.0)
COEFFICIENTS = "gradient_coefficients.grad"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--scheme", default="hasc55")
    parser.add_argument("--resolution", type=float, default=2.5, help="voxel size of the series in mm")
    parser.add_argument("--sizes", type=float, nargs="+", default=SIZES_MM, help="largest displacement in mm")
    options = parser.parse_args()
    table = {}
    for size in options.sizes:
        phantom = options.out / f"phantom-{size:g}"
        if not phantom.exists():
            settings = PhantomSettings(
                scheme=options.scheme, resolution=options.resolution, gradient_nonlinearity=size, snr=0, ideal=False
            )
            make_phantom(phantom, settings)
        for corrected in (True, False) if size else (False,):
            name = f"{size:g} mm, {'corrected' if corrected else 'not corrected'}"
            table[name] = _measure(phantom, options.out / name.replace(" ", "-").replace(",", ""), corrected, options)
            print(name, json.dumps(table[name]), flush=True)
    (options.out / "gradient_nonlinearity.json").write_text(json.dumps(table, indent=1) + "\n")


def _measure(phantom: Path, out: Path, corrected: bool, options: argparse.Namespace) -> dict[str, float]:
    """Scores that the nonlinearity affects."""
    chosen = ["--gradient-coefficients", str(phantom / COEFFICIENTS)] if corrected else []
    arguments = [str(phantom / "bids"), str(out), "participant", "--output-resolution", f"{options.resolution:g}"]
    arguments += ["--denoise-method", "none", "--skip-anat-based-spatial-normalization", "-w", str(out / "work")]
    if run([*arguments, *chosen]):
        raise SystemExit(f"{out}: preprocessing failed")
    wanted = ("combined", "gradients", "coregistration", "motion: displacement", "b=0 reference")
    found = score(out, phantom / "truth")
    return {s.name: round(s.value, 4) for s in found if s.value is not None and s.name.startswith(wanted)}


if __name__ == "__main__":
    main()
