"""The same work on several devices: `python benchmarks/devices.py OUT [--devices cpu cuda]`.

Head motion (phantom, DSI-257 at 2.5 mm), blip-up/blip-down correction (a simulated pair at 2 mm), correction without a
fieldmap, and the registration of a 1 mm brain to the template. Each runs twice on each device, and the second time
counts: by then kernels are compiled. One Markdown table: seconds of wall time, and how far in mm the result lies from
that of the first device, mean and largest over the brain.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import distortion as pairs
import numpy as np

from dsiprep.api.blip_pair import correct_pair
from dsiprep.data.grid import Volume
from dsiprep.data.results import Acquired, Anatomy
from dsiprep.device import choose, to_cpu, use_threads, with_cpu_fallback
from dsiprep.io.bids import find_units, read_unit
from dsiprep.io.nifti import read_volume
from dsiprep.io.templates import load_template
from dsiprep.ops.registration.diffeomorphic import register_diffeomorphic
from dsiprep.phantom import PhantomSettings, make_phantom
from dsiprep.settings import AnatomySettings, CoregisterSettings, MotionSettings, Settings
from dsiprep.stages.acquisition import conform
from dsiprep.stages.anatomy import process_anatomy
from dsiprep.stages.coregister import coregister
from dsiprep.stages.fieldmapless import correct_without_fieldmap
from dsiprep.stages.motion import estimate_motion

Work = Callable[[str], np.ndarray]  # a device's name to displacements in mm: points or voxels last


def motion(acquired: Acquired) -> Work:
    """Where all volumes of the phantom send points of a head."""
    points = 60 * np.concatenate([np.eye(3), -np.eye(3)]) + acquired.mask.grid.to_world(
        np.argwhere(acquired.mask.numpy() > 0.5)
    ).mean(0)

    def work(device: str) -> np.ndarray:
        found = with_cpu_fallback(
            lambda dwi, mask: estimate_motion(dwi, mask, MotionSettings(), acquired.blips[0].pe, acquired.multiband),
            choose(device),
            (acquired.dwi, acquired.mask),
        )
        sent = found.transforms[:, None, :3, :3] @ points[:, :, None] + found.transforms[:, None, :3, 3:]
        return np.moveaxis(sent[..., 0], -1, 0).reshape(3, -1)

    return work


def pair(out: Path) -> Work:
    """Displacement of blip-up."""
    brain = read_volume(out / "pair" / "brain.nii.gz").numpy() > 0
    files = [out / "pair" / f"{name}.nii.gz" for name in ("up", "down")]

    def work(device: str) -> np.ndarray:
        found = correct_pair(*files, pe_dir="j", readout_time=pairs.READOUT_TIME, device=device)
        return found.fields[0].data.numpy()[:, brain]

    return work


def seen(out: Path) -> Anatomy:
    """The T1w of the phantom."""
    t1w = next((out / "bids").rglob("*_T1w.nii.gz"))
    settings = replace(AnatomySettings(), normalize=False)
    return process_anatomy((read_volume(t1w),), None, None, load_template("", "T1w"), settings)


def alone(acquired: Acquired, anatomy: Anatomy) -> Work:
    """Displacement of the first b=0 volume, the tissues in place of a fieldmap."""
    pe, mask = acquired.blips[0].pe, acquired.mask
    assert pe is not None
    b0 = Volume(acquired.dwi.data[int(np.argmin(acquired.dwi.bvals))], acquired.dwi.grid)
    start = coregister(b0, mask, anatomy, CoregisterSettings())

    def work(device: str) -> np.ndarray:
        found = with_cpu_fallback(
            lambda image: correct_without_fieldmap(pe, image, mask, anatomy, start), choose(device), (b0,)
        )
        return found.fields[0].data.numpy()[:, mask.numpy() > 0.5]

    return work


def template(anatomy: Anatomy) -> Work:
    """Displacement from the template."""
    target = load_template("", "T1w")
    brain = target.mask.numpy() > 0.5

    def work(device: str) -> np.ndarray:
        on = choose(device)
        fit = register_diffeomorphic(
            anatomy.image.to(on), target.brain.to(on), np.eye(4), fixed_mask=target.mask.to(on), finest_mm=1.0
        )
        return to_cpu(fit.forward.data).numpy()[:, brain]

    return work


def prepared(out: Path) -> Iterator[tuple[str, Work]]:
    """What there is to do, by name; the phantoms are made where they are missing."""
    if not (out / "bids").exists():
        make_phantom(out, PhantomSettings(moved=0.15, ideal=False))
    if not (out / "pair").exists():
        pairs.simulate(out / "pair", 2.0, 8.0, 0.5, 1.0, 20.0, 1)
    settings, anatomy = Settings(), seen(out)
    acquired = conform(read_unit(find_units(out / "bids", settings)[0], settings), settings.acquisition)
    yield "head motion, DSI-257, 2.5 mm", motion(acquired)
    yield "blip pair, 2 mm", pair(out)
    yield "without a fieldmap, 2.5 mm", alone(acquired, anatomy)
    yield "normalisation, 1 mm", template(anatomy)


def main() -> None:
    """Run all, print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--devices", nargs="+", default=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    use_threads(chosen.threads)
    for device in chosen.devices:
        choose(device)
    print("| work | device | s | mean mm from the first | largest |\n|---|---|---|---|---|", flush=True)
    for name, work in prepared(chosen.out):
        first: np.ndarray | None = None
        for device in chosen.devices:
            work(device)
            start = time.perf_counter()
            found = work(device)
            seconds = time.perf_counter() - start
            first = found if first is None else first
            apart = np.linalg.norm(found - first, axis=0)
            print(f"| {name} | {device} | {seconds:.1f} | {apart.mean():.4f} | {apart.max():.4f} |", flush=True)


if __name__ == "__main__":
    main()
