"""Gradient nonlinearity on phantoms with known truth: `python benchmarks/gradient_nonlinearity.py OUT`.

For each size of the nonlinearity, a phantom with motion and distortion is preprocessed with the coefficients and
without them, and once more without nonlinearity, for what the other errors are. Prints the position of points of the
T1w in the raw volumes, b-values and directions; those of single volumes are what `acting_gradients` gives.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import nibabel as nib
import numpy as np

from dsiprep import acting_gradients
from dsiprep.cli.app import main as run
from dsiprep.phantom import PhantomSettings, make_phantom
from dsiprep.score import score
from dsiprep.score.read import apply, find, read_matrix, read_truth

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
                scheme=options.scheme, resolution=options.resolution, gradient_nonlinearity=size, ideal=False, seed=3
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
    wanted = ("combined", "gradients", "coregistration", "motion: displacement", "b-vectors: .b", "outlier")
    found = score(out, phantom / "truth")
    values = {s.name: round(s.value, 4) for s in found if s.value is not None and s.name.startswith(wanted)}
    return values | (_single_volumes(phantom, out) if corrected else {})


def _single_volumes(phantom: Path, out: Path) -> dict[str, float]:
    """Errors of the b-values and directions that `acting_gradients` gives for single volumes, in the brain."""
    truth, (series,) = read_truth(phantom / "truth"), out.rglob("*_space-ACPC_desc-preproc_dwi.nii.gz")
    brain, deviation = truth.image("T1w_brain_mask"), truth.image("gradient_deviation")
    to_head = read_matrix(find(out, "*_from-anat_to-ACPC_mode-image_xfm.mat"))
    affine, errors, angles = nib.Nifti1Image.from_filename(series).affine, [], []
    for v in np.flatnonzero(truth.bvals > 100)[::3]:
        bvals, bvecs = acting_gradients(series, phantom / COEFFICIENTS, int(v))
        head = apply(to_head @ affine, np.argwhere(np.ones(bvals.shape, bool)).astype(float))
        inside = brain.at(head, order=0) > 0.5
        pose, g = truth.poses[v], np.asarray(truth.table["bvecs_scanner"][v])
        local = np.eye(3) + deviation.at(apply(pose, head[inside]), order=3).reshape(-1, 3, 3)
        true = local @ g @ pose[:3, :3]
        found = bvecs.reshape(3, -1).T[inside] @ to_head[:3, :3].T
        length = np.linalg.norm(true, axis=1)
        errors.append(100 * np.abs(bvals.ravel()[inside] / (truth.bvals[v] * length**2) - 1))
        angles.append(np.rad2deg(np.arccos(np.clip(np.abs((found * true).sum(1)) / length, 0, 1))))
    b, angle = np.concatenate(errors), np.concatenate(angles)
    values = {"b, %": b, "direction, deg": angle}
    means = {f"single volumes: {name}": round(float(x.mean()), 4) for name, x in values.items()}
    return means | {
        f"single volumes: {name}, 95 %": round(float(np.percentile(x, 95)), 4) for name, x in values.items()
    }


if __name__ == "__main__":
    main()
