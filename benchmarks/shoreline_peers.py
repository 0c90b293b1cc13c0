"""dsiprep's SHORELine beside QSIPrep's recipe, in one run: `python benchmarks/shoreline_peers.py OUT [VOLUMES]`.

On the phantom of `shoreline.py` with 15 % of its volumes moved, CPU seconds a volume, all processes with one thread:

- dsiprep's whole motion stage over the number of volumes, from `python benchmarks/shoreline.py`'s measurement;
- QSIPrep's prediction of a volume: all other volumes are loaded again and fitted again, by its own code
  (`qsiprep.utils.brainsuite_shore` of the wheel on PyPI, which pip downloads into OUT);
- QSIPrep's registration of a volume to that prediction: the antsRegistration of antspyx with QSIPrep's precise Rigid
  settings (from the same wheel) and, as a fair variant, with 100x60 iterations, which are enough.

QSIPrep predicts and registers every volume twice (`--shoreline-iters 2`). Volumes are moved ones, spread evenly over b.
The series that QSIPrep's code sees is aligned by dsiprep, so its targets are as good as they get. Errors of poses are
there too.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import types
import zipfile
from pathlib import Path

import numpy as np

QSIPREP = "26.0.0"
CASE = "dsi257 15 % moved"
FAIR = {"number_of_iterations": [[100, 60]]}


def wheel(out: Path) -> Path:
    """QSIPrep's files, as they come from PyPI."""
    folder = out / f"qsiprep-{QSIPREP}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory() as place:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place]
            subprocess.run([*pip, f"qsiprep=={QSIPREP}"], check=True)
            zipfile.ZipFile(next(Path(place).glob("*.whl"))).extractall(folder)
    return folder / "qsiprep"


def shore_model(source: Path) -> types.ModuleType:
    """Its 3dSHORE, without the rest of the package, which needs nipype."""
    package = types.ModuleType("qsiprep_utils")
    package.__path__ = [str(source / "utils")]
    sys.modules[package.__name__] = package
    vars(np)["ComplexWarning"] = np.exceptions.ComplexWarning  # NumPy 1 had it there, and QSIPrep looks for it
    return importlib.import_module("qsiprep_utils.brainsuite_shore")


def predict(source: Path, folder: Path, wanted: int) -> tuple[np.ndarray, float]:
    """One volume as QSIPrep predicts it from files of aligned volumes, and the CPU seconds that takes."""
    import nibabel as nib
    from dipy.core.gradients import gradient_table

    shore = shore_model(source)
    table = np.load(folder / "table.npz")
    bvals, bvecs, mask = table["bvals"], table["bvecs"], table["mask"]
    start = time.process_time()
    q = np.sqrt(bvals)[:, None] * bvecs
    away = np.minimum(np.linalg.norm(q - q[wanted], axis=1), np.linalg.norm(q + q[wanted], axis=1))
    others = np.flatnonzero((bvals > 100) & (away > 0.02 * np.linalg.norm(q, axis=1).max()))
    paths = [folder / "b0.nii.gz", *(folder / f"{v:04d}.nii.gz" for v in others)]
    data = np.stack([nib.load(path).get_fdata(dtype=np.float32) for path in paths], axis=-1)
    training = gradient_table(np.r_[0, bvals[others]], bvecs=np.vstack([np.zeros(3), bvecs[others]]))
    model = shore.BrainSuiteShoreModel(training, regularization="L2")
    fitted = model.fit(data, mask=mask)
    one = gradient_table(np.r_[bvals[wanted], 0], bvecs=np.vstack([bvecs[wanted], np.zeros(3)]))
    basis = shore.brainsuite_shore_basis(model.radial_order, model.zeta, one, model.tau)[0]
    predicted = np.zeros(mask.shape, np.float32)
    predicted[mask] = np.dot(fitted._shore_coef[mask], basis)
    return predicted, time.process_time() - start


def register(settings: dict, fixed: Path, moving: Path, mask: Path) -> tuple[np.ndarray, float]:
    """antsRegistration as QSIPrep's interface calls it: the rigid matrix (LPS), and CPU seconds."""
    import ants

    iterations = "x".join(map(str, settings["number_of_iterations"][0]))
    with tempfile.TemporaryDirectory() as place:
        words = [
            "--collapse-output-transforms", "1", "--dimensionality", "3", "--float", "1", "--interpolation", "BSpline",
            "--output", f"[{place}/x,{place}/x.nii.gz]",
            "--transform", f"Rigid[{settings['transform_parameters'][0][0]}]",
            "--metric", f"Mattes[{fixed},{moving},1,{settings['radius_or_number_of_bins'][0]},"
            f"{settings['sampling_strategy'][0]},{settings['sampling_percentage'][0]}]",
            "--convergence", f"[{iterations},{settings['convergence_threshold'][0]},"
            f"{settings['convergence_window_size'][0]}]",
            "--smoothing-sigmas", "x".join(map(str, settings["smoothing_sigmas"][0])) + "mm",
            "--shrink-factors", "x".join(map(str, settings["shrink_factors"][0])),
            "--use-histogram-matching", "0", "--masks", f"[{mask},NULL]", "--winsorize-image-intensities",
            f"[{settings['winsorize_lower_quantile']},{settings['winsorize_upper_quantile']}]",
        ]  # fmt: skip
        run = "import sys; from ants.internal import get_lib_fn; sys.exit(get_lib_fn('antsRegistration')(sys.argv[1:]))"
        threads = os.environ | {"ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1"}
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", run, *words], check=True, capture_output=True, env=threads)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found = ants.read_transform(f"{place}/x0GenericAffine.mat")
    turn, centre = found.parameters[:9].reshape(3, 3), found.fixed_parameters
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = turn, found.parameters[9:] + centre - turn @ centre
    return matrix, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def prepare(bids: Path, folder: Path) -> dict:
    """The files that QSIPrep's nodes would find, and dsiprep's own numbers."""
    import nibabel as nib

    from dsiprep import align_series, estimate_motion

    path = next(bids.rglob("*_dir-PA_dwi.nii.gz"))
    image, stem = nib.load(path), str(path).removesuffix(".nii.gz")
    data = image.get_fdata(dtype=np.float32)
    bvals, bvecs = np.loadtxt(f"{stem}.bval"), np.loadtxt(f"{stem}.bvec").T
    start = time.process_time()
    motion = estimate_motion(data, image.affine, bvals, bvecs, phase_encoding="j")
    seconds = time.process_time() - start
    aligned, turned = align_series(data, image.affine, bvecs, motion)
    mask = motion.mask.numpy() > 0.5
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "table.npz", bvals=bvals, bvecs=turned, mask=mask)
    for volume in range(len(bvals)):
        nib.Nifti1Image(aligned[..., volume], image.affine).to_filename(folder / f"{volume:04d}.nii.gz")
        nib.Nifti1Image(data[..., volume], image.affine).to_filename(folder / f"raw{volume:04d}.nii.gz")
    nib.Nifti1Image(aligned[..., bvals <= 100].mean(-1), image.affine).to_filename(folder / "b0.nii.gz")
    nib.Nifti1Image(mask.astype(np.float32), image.affine).to_filename(folder / "mask.nii.gz")
    return {"seconds": seconds, "poses": motion.transforms, "bvals": bvals, "affine": image.affine, "mask": mask}


def race(source: Path, folder: Path, ours: dict, true: np.ndarray, sample: np.ndarray) -> dict[str, np.ndarray]:
    """CPU seconds of QSIPrep's steps, and everybody's mean errors (mm), each one number a volume."""
    import nibabel as nib

    from dsiprep.ops.image.affine import mean_rigid, point_displacement

    settings = json.loads((source / "data" / "shoreline_precise_Rigid.json").read_text())
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])
    points = np.argwhere(ours["mask"])[::200] @ ours["affine"][:3, :3].T + ours["affine"][:3, 3]
    weighted = ours["bvals"] > 100
    frame = mean_rigid(
        np.linalg.inv(true)[weighted] @ ours["poses"][weighted]
    )  # of dsiprep's reference, in the truth's
    rows: dict[str, list[float]] = {}
    for volume in sample:
        predicted, taken = predict(source, folder, int(volume))
        rows.setdefault("refit", []).append(taken)
        nib.Nifti1Image(predicted, ours["affine"]).to_filename(folder / "predicted.nii.gz")
        found = {"dsiprep": ours["poses"][volume]}
        for name, chosen in (("precise", settings), ("fair", settings | FAIR)):
            matrix, taken = register(
                chosen, folder / "predicted.nii.gz", folder / f"raw{volume:04d}.nii.gz", folder / "mask.nii.gz"
            )
            rows.setdefault(name, []).append(taken)
            found[name] = flip @ matrix @ flip
        for name, matrix in found.items():
            away = point_displacement((matrix @ np.linalg.inv(frame))[None], true[volume][None], points).mean()
            rows.setdefault(f"{name} mm", []).append(float(away))
    return {name: np.asarray(row) for name, row in rows.items()}


def main(out: Path, count: int) -> None:
    """The table."""
    from dsiprep.cli.tools import main as tools

    phantom = out / CASE.replace(" ", "_").replace("%", "pc")
    if not (phantom / "truth" / "truth.json").is_file():
        tools(["phantom", str(phantom), "--no-ideal", "--distortion", "0", "--moved", "0.15"])
    source, folder = wheel(out), out / "peers"
    ours = prepare(phantom / "bids", folder)
    truth = json.loads((phantom / "truth" / "truth.json").read_text())
    true = np.asarray(truth["head_to_scanner"]) @ np.linalg.inv(truth["head_to_scanner"][0])
    weighted = ours["bvals"] > 100
    moved = np.flatnonzero(np.asarray(truth["moved"]) & weighted)
    sample = moved[np.argsort(ours["bvals"][moved])[np.linspace(0, len(moved) - 1, count).astype(int)]]
    rows = race(source, folder, ours, true, sample)
    own = ours["seconds"] / weighted.sum()
    b = np.round(ours["bvals"][sample]).astype(int)
    print(f"Moved volumes {sample.tolist()} of b {b.tolist()}; {int(ours['mask'].sum())} voxels of brain")
    print("| what, for one volume | CPU s | of dsiprep's | mean error mm |\n|---|---|---|---|")
    print(f"| dsiprep, all of its rounds | {own:.2f} | 1 | {rows['dsiprep mm'].mean():.3f} |")
    for name, text in (("precise", "QSIPrep's settings"), ("fair", "100x60 iterations")):
        refit, registration = rows["refit"].mean(), rows[name].mean()
        print(
            f"| QSIPrep, {text}: twice {refit:.0f} s of refitting and {registration:.0f} s of registration "
            f"| {2 * (refit + registration):.0f} | {2 * (refit + registration) / own:.0f} "
            f"| {rows[f'{name} mm'].mean():.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 3)
