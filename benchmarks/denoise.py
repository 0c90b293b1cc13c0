"""Denoising of phantoms of known truth, beside MRtrix3 and DIPY: `python benchmarks/denoise.py OUT [options]`.

OUT keeps the noise-free series between calls. Noise is Rician (`--noise gaussian` adds it to the signal), uniform or
higher in the middle of the head (`--variation`), of one coil or of several (`--coils`); `--moved` is the fraction of
volumes with head motion. All methods get the same file and the same brain mask, and one thread. Columns:

- error: root mean square over the brain of what is found less what is sought, in % of the noise: the expected
  magnitude where the noise floor remains, the noise-free signal where it is removed
- signal: the same to the noise-free signal, whatever the method seeks
- lost: share of the true diffusion contrast (the noise-free signal less its mean over volumes) in the residual, the
  slope of its regression on that contrast, in %
- edges: correlation of the mean residual of b=0 with the Laplacian of the true b=0
- noise: noise map over the truth less one, mean and standard deviation over the brain, in %
- high b: mean signal of white matter at b of 5000 and more (or the upper third) over the truth less one, in %
- CPU: user and system seconds of the call, without reading and writing; of dwidenoise with both
- memory: most that the process held at once, in GB
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid, Volume
from dsiprep.ops.intensity.magnitude_noise import expected_magnitude
from dsiprep.phantom.dataset import FIELD_OF_VIEW
from dsiprep.phantom.head import Head, make_head, slabs
from dsiprep.phantom.interpolation import interpolate
from dsiprep.phantom.scanner import add_noise, noise_map
from dsiprep.phantom.schemes import load_scheme
from dsiprep.phantom.session import Session, plan_session
from dsiprep.phantom.settings import PhantomSettings
from dsiprep.phantom.signal import make_tissue
from dsiprep.settings import DenoiseSettings
from dsiprep.stages.denoise import denoise, floor_method

OURS = ("dwidenoise", "dwidenoise2", "svht", "patch2self")
THEIRS = ("mrtrix", "dipy-mppca", "dipy-patch2self")


def make_truth(out: Path, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Noise-free series (n, i, j, k), brain, white matter and b-table, kept in OUT."""
    path = out / f"{args.scheme}_{args.resolution:g}mm_{args.slices}_{args.moved:g}.npz"
    if not path.exists():
        settings = PhantomSettings(scheme=args.scheme, resolution=args.resolution, moved=args.moved, seed=3)
        streams = np.random.default_rng(3).spawn(2)
        head = make_head(streams[0])
        session = middle_slices(plan_session(head, load_scheme(args.scheme), settings, streams[1]), args.slices)
        tissue = make_tissue(head, head.box(np.asarray(FIELD_OF_VIEW) + 36, args.resolution / 2))
        data = np.stack([session.acquire(tissue, v) for v in range(len(session.bvals))])
        maps = {name: fraction(head, session, name) for name in ("brain", "wm")}
        np.savez(path, data=data, **maps, bvals=session.bvals, bvecs=session.bvecs, affine=session.grid.affine)
    return dict(np.load(path))


def middle_slices(session: Session, count: int) -> Session:
    grid = session.grid
    first = (grid.shape[2] - count) // 2
    affine = grid.affine.copy()
    affine[:3, 3] += first * affine[:3, 2]
    slices = session.signal_fraction[:, first : first + count]
    return replace(session, grid=Grid((*grid.shape[:2], count), affine), signal_fraction=slices)


def fraction(head: Head, session: Session, name: str) -> np.ndarray:
    """Tissue fraction at the pose of the first volume, (i, j, k)."""
    to_head = np.linalg.inv(session.poses[0])
    parts = [
        interpolate(head.atlas[name], head.atlas_grid, head.to_template(points @ to_head[:3, :3].T + to_head[:3, 3]))
        for _, points in slabs(session.grid)
    ]
    return np.concatenate(parts).reshape(session.grid.shape).astype(np.float32)


def run_one(method: str, folder: Path) -> None:
    """Denoise OUT/work/noisy.nii in this process; write result, noise map, CPU seconds and peak memory."""
    torch.set_num_threads(1)
    image = nib.load(folder / "noisy.nii")
    data = np.ascontiguousarray(np.moveaxis(image.get_fdata(dtype=np.float32), -1, 0))
    inside = nib.load(folder / "mask.nii").get_fdata(dtype=np.float32)
    table = np.loadtxt(folder / "table.txt")
    sigma = np.zeros_like(inside)
    start = time.process_time()
    if method.startswith("dipy"):
        values, sigma = by_dipy(method, data, inside, table)
    else:
        name, _, floor = method.partition("+")
        settings = DenoiseSettings(method=name, noise_floor=floor or "auto")
        run = np.zeros(len(table), int)
        dwi = DWI(torch.from_numpy(data), Grid(inside.shape, image.affine), table[:, 0], table[:, 1:], run, run)
        result = denoise(dwi, Volume(torch.from_numpy(inside), dwi.grid), settings)
        values = result.dwi.data.numpy()
        sigma = result.noise.data.numpy() if result.noise is not None else sigma
        print(result.method, file=sys.stderr)
    seconds = time.process_time() - start
    np.save(folder / "found.npy", values)
    np.save(folder / "sigma.npy", sigma)
    (folder / "cost.json").write_text(json.dumps([seconds, peak_memory(os.getpid())]))


def peak_memory(process: int) -> float:
    """Most memory that a process has held since its program started, in GB; 0 if it has ended."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return int(lines.get("VmHWM", "0 kB").split()[0]) / 1e6


def by_dipy(method: str, data: np.ndarray, inside: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from dipy.denoise.localpca import mppca
    from dipy.denoise.patch2self import patch2self

    last = np.moveaxis(data, 0, -1)
    if method == "dipy-mppca":
        values, sigma = mppca(last, mask=inside > 0, patch_radius=2, return_sigma=True)
        return np.moveaxis(values, -1, 0), sigma
    values = patch2self(last, table[:, 0], b0_threshold=50, shift_intensity=False, clip_negative_vals=False)
    return np.moveaxis(values, -1, 0), np.zeros_like(inside)


def run_method(method: str, folder: Path) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Result (n, i, j, k), noise map, CPU seconds and peak memory in GB."""
    if method != "mrtrix":
        subprocess.run([sys.executable, __file__, str(folder), "--one", method], check=True)
        seconds, memory = json.loads((folder / "cost.json").read_text())
        return np.load(folder / "found.npy"), np.load(folder / "sigma.npy"), seconds, memory
    names = [str(folder / name) for name in ("noisy.nii", "found.nii", "sigma.nii", "mask.nii")]
    command = ["dwidenoise", "-nthreads", "0", "-force", "-quiet", *names[:2], "-noise", names[2], "-mask", names[3]]
    process, ended, memory = subprocess.Popen(command), 0, 0.0
    while not ended:
        memory = max(memory, peak_memory(process.pid))
        time.sleep(0.05)
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
    if status:
        raise SystemExit("dwidenoise failed")
    found, sigma = (nib.load(name).get_fdata(dtype=np.float32) for name in names[1:3])
    return np.moveaxis(found, -1, 0), sigma, usage.ru_utime + usage.ru_stime, memory


def measure(found: np.ndarray, sigma: np.ndarray, noisy: np.ndarray, case: dict[str, np.ndarray], floor: str) -> list:
    """The columns of the table but cost."""
    brain, truth, true_sigma = case["inside"], case["data"], case["sigma"]
    sought = truth if floor != "none" else case["expected"]
    error = (found - sought)[:, brain] / true_sigma[brain]
    signal = (found - truth)[:, brain] / true_sigma[brain]
    contrast = truth[:, brain] - truth[:, brain].mean(0)
    residual = (noisy - found)[:, brain] - (case["expected"] - sought)[:, brain]
    lost = (residual * contrast).sum() / (contrast**2).sum()
    is_b0 = case["bvals"] <= 100
    outline = ndimage.laplace(truth[is_b0].mean(0))[brain]
    edges = np.corrcoef((noisy - found)[is_b0][:, brain].mean(0), outline)[0, 1]
    ratio = sigma[brain] / true_sigma[brain] - 1
    white, high = (case["wm"] > 0.85) & brain, case["bvals"] >= min(5000, 0.7 * case["bvals"].max())
    level = found[high][:, white].mean() / truth[high][:, white].mean() - 1
    rms = [100 * np.sqrt((e**2).mean()) for e in (error, signal)]
    return [*rms, 100 * lost, edges, 100 * ratio.mean(), 100 * ratio.std(), 100 * level]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scheme", default="dsi101")
    parser.add_argument("--resolution", type=float, default=4.0)
    parser.add_argument("--slices", type=int, default=20)
    parser.add_argument("--moved", type=float, default=0.15)
    parser.add_argument("--snr", type=float, nargs="+", default=[8.0, 15.0, 25.0, 40.0])
    parser.add_argument("--noise", choices=("rician", "gaussian"), default="rician")
    parser.add_argument("--variation", type=float, default=0.0)
    parser.add_argument("--coils", type=int, default=1)
    parser.add_argument("--methods", nargs="+", default=["mrtrix", *OURS], help=f"of {', '.join((*OURS, *THEIRS))}")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return run_one(args.one, args.out)
    work = args.out / "work"
    work.mkdir(parents=True, exist_ok=True)
    case = make_truth(args.out, args)
    case["inside"] = case["brain"] > 0.5
    b0 = case["data"][case["bvals"] <= 100].mean(0)[case["inside"]].mean()
    print(f"{case['data'].shape}, {case['inside'].sum()} voxels of brain, {args.noise} noise, {args.coils} coils")
    print(f"{'SNR':>4s} {'method':16s}   error  signal   lost  edges  noise ± sd   high b     CPU  memory", flush=True)
    for snr in args.snr:
        grid = Grid(case["inside"].shape, case["affine"])
        centre = grid.to_world(np.argwhere(case["inside"])).mean(0)
        case["sigma"] = noise_map(grid, centre, b0 / snr, args.variation)
        noisy = write_noisy(work, case, args)
        for method in args.methods:
            found, sigma, seconds, memory = run_method(method, work)
            name, _, floor = method.partition("+")
            ours = name in OURS and args.noise != "gaussian"
            kept = floor_method(DenoiseSettings(method=name, noise_floor=floor or "auto")) if ours else "none"
            e, s, lost, edges, ratio, spread, level = measure(found, sigma, noisy, case, kept)
            print(
                f"{snr:4g} {method:16s} {e:7.1f} {s:7.1f} {lost:6.3f} {edges:6.3f} {ratio:+6.1f} ± {spread:.1f} "
                f"{level:+8.1f} {seconds:7.1f} {memory:7.2f}",
                flush=True,
            )
    return None


def write_noisy(work: Path, case: dict[str, np.ndarray], args: argparse.Namespace) -> np.ndarray:
    """Add noise, write what the methods read, and set the expectation of the noisy series."""
    rng, sigma, truth = np.random.default_rng(1), case["sigma"], case["data"]
    if args.noise == "gaussian":
        noisy = truth + sigma * rng.standard_normal(truth.shape, np.float32)
        case["expected"] = truth
    else:
        noisy = np.stack([add_noise(volume, sigma, rng, args.coils) for volume in truth])
        amplitude = np.linspace(0, truth.max() / sigma.min() + 1, 20_000)
        table = expected_magnitude(amplitude, args.coils)
        case["expected"] = (np.interp(truth / sigma, amplitude, table) * sigma).astype(np.float32)
    nib.save(nib.Nifti1Image(np.moveaxis(noisy, 0, -1), case["affine"]), work / "noisy.nii")
    mask = ndimage.binary_dilation(case["inside"]).astype(np.float32)
    nib.save(nib.Nifti1Image(mask, case["affine"]), work / "mask.nii")
    np.savetxt(work / "table.txt", np.column_stack([case["bvals"], case["bvecs"]]))
    return noisy


if __name__ == "__main__":
    main()
