"""Whether verdicts find faults planted into phantoms: `python benchmarks/planted_faults.py OUT [CASE ...]`.

Each case is a DSI-101 phantom at 5 mm with one fault, preprocessed at 4 mm; two have none. A Markdown table gives the
verdicts that are not fine. Cases share the cached results that a fault does not change.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np

from dsiprep.cli.app import main as preprocess
from dsiprep.cli.tools import main as tools
from dsiprep.data.results import Coregistration
from dsiprep.stages import coregister

QUIET = ("--moved", "0.03", "--max-motion", "0.3")  # framewise displacement stays below 2.3 mm
FIRST = "clean"


def simulate(case: Path, *options: str, resolution: float = 5.0, seed: int = 11) -> None:
    """A phantom in `case`."""
    tools(["phantom", str(case), "--scheme", "dsi101", "--resolution", str(resolution), "--t1w-resolution", "2",
           "--no-ideal", "--seed", str(seed), *options])  # fmt: skip


def copy_first(case: Path) -> None:
    """The dataset of the first case, to be damaged."""
    shutil.copytree(case.parent / FIRST / "bids", case / "bids")


def edit_sidecars(case: Path, pattern: str, change: Callable[[str], str]) -> None:
    """Change PhaseEncodingDirection in sidecars."""
    for path in (case / "bids").rglob(pattern):
        content = json.loads(path.read_text())
        if "PhaseEncodingDirection" in content:
            content["PhaseEncodingDirection"] = change(content["PhaseEncodingDirection"])
            path.write_text(json.dumps(content))


def flipped_b_vectors(case: Path) -> None:
    copy_first(case)
    path = next((case / "bids").rglob("*.bvec"))
    np.savetxt(path, np.loadtxt(path) * [[-1], [1], [1]], fmt="%.6f")


def cut_mask(case: Path) -> list[str]:
    """The upper fifth of the brain is missing from the mask that the user gives."""
    copy_first(case)
    mask = nib.load(case.parent / FIRST / "truth" / "T1w_brain_mask.nii.gz")
    data = np.asarray(mask.dataobj).astype(np.uint8)
    data[:, :, int(np.percentile(np.argwhere(data > 0)[:, 2], 82)) :] = 0
    nib.save(nib.Nifti1Image(data, mask.affine), case / "cut_mask.nii.gz")
    return ["--anat-mask", str(case / "cut_mask.nii.gz")]


def wrong_sign(case: Path) -> None:
    """The sidecar of the reversed images gives the sign of the series."""
    copy_first(case)
    edit_sidecars(case, "*_epi.json", lambda text: text[:-1] if text.endswith("-") else f"{text}-")


def wrong_axis(case: Path) -> None:
    copy_first(case)
    edit_sidecars(case, "*.json", lambda text: text.replace("j", "i"))


def slab(case: Path) -> None:
    """The upper fifth of the head is outside the series."""
    copy_first(case)
    for path in (case / "bids").rglob("*_dwi.nii.gz"):
        image = nib.load(path)
        nib.save(image.slicer[:, :, : int(0.78 * image.shape[2])], path)


def ringing(case: Path) -> None:
    """k-space of a phantom of half the voxel size, truncated in the plane and averaged across slices."""
    simulate(case, *QUIET, resolution=2.5)
    for path in [*(case / "bids").rglob("*_dwi.nii.gz"), *(case / "bids").rglob("*_epi.nii.gz")]:
        image = nib.load(path)
        data = np.asarray(image.dataobj, np.float32)
        x, y, z = (n // 4 * 4 for n in data.shape[:3])
        data = (data[:x, :y, 0:z:2] + data[:x, :y, 1:z:2]) / 2
        spectrum = np.fft.fftshift(np.fft.fft2(data, axes=(0, 1)), axes=(0, 1))
        spectrum = spectrum[x // 4 : x // 4 + x // 2, y // 4 : y // 4 + y // 2]
        data = np.abs(np.fft.ifft2(np.fft.ifftshift(spectrum, axes=(0, 1)), axes=(0, 1))) / 4
        affine = image.affine.copy()
        affine[:3, 3] += affine[:3, 2] / 2
        affine[:3, :3] *= 2
        nib.save(nib.Nifti1Image(data.astype(np.float32), affine), path)
        sidecar = path.with_name(path.name.replace(".nii.gz", ".json"))
        content = json.loads(sidecar.read_text())
        if "SliceTiming" in content:
            content["SliceTiming"] = content["SliceTiming"][0 : 2 * data.shape[2] : 2]
            sidecar.write_text(json.dumps(content))


def misplaced(*given: object) -> Coregistration:
    """The coregistration, off by 10 mm."""
    found = COREGISTER(*given)
    matrix = found.dwiref_to_acpc.matrix.copy()
    matrix[1, 3] += 10
    return replace(found, dwiref_to_acpc=replace(found.dwiref_to_acpc, matrix=matrix))


COREGISTER = coregister.coregister
CASES: dict[str, Callable[[Path], list[str] | None]] = {
    FIRST: lambda case: simulate(case, *QUIET),
    "clean, other head": lambda case: simulate(case, *QUIET, seed=12),
    "mask that cuts": cut_mask,
    "flipped b-vectors": flipped_b_vectors,
    "coregistration off by 10 mm": copy_first,
    "dropout in 8 % of slices": lambda case: simulate(case, *QUIET, "--dropout", "0.08"),
    "ringing": ringing,
    "wrong phase-encoding sign": wrong_sign,
    "wrong phase-encoding axis": wrong_axis,
    "motion to 8 mm in 60 %": lambda case: simulate(case, "--moved", "0.6", "--max-motion", "8"),
    "signal-to-noise ratio 5": lambda case: simulate(case, *QUIET, "--snr", "5"),
    "slab without vertex": slab,
}


def run(out: Path, name: str) -> None:
    """Prepare and preprocess one case, and print its row."""
    case = out / name.replace(" ", "_").replace(",", "").replace("%", "percent")
    options: list[str] = []
    if not case.exists():
        options = CASES[name](case) or []
    shared = out / FIRST / "work" / "sub-01"
    misplaces = "off by" in name
    for folder in shared.glob("*-*") if name != FIRST and not misplaces else ():
        shutil.copytree(folder, case / "work" / "sub-01" / folder.name, dirs_exist_ok=True)
    coregister.coregister = misplaced if misplaces else COREGISTER
    code = preprocess([str(case / "bids"), str(case / "out"), "participant", "--output-resolution", "4", "--keep-work",
                       "-w", str(case / "work"), "--device", "cpu", *options])  # fmt: skip
    record = next((case / "out").glob("sub-01/figures/*_desc-quality_dwi.json"), None)
    verdicts = json.loads(record.read_text())["verdicts"] if record else []
    shown = [f"{v['state']}: {v['title']}, {v['reason']}" for v in verdicts if v["state"] in ("bad", "look")]
    print(f"| {name} | {code} | {'<br>'.join(shown) or 'all fine'} |", flush=True)


if __name__ == "__main__":
    print("| case | exit code | verdicts |\n|---|---|---|")
    for chosen in sys.argv[2:] or list(CASES):
        run(Path(sys.argv[1]).resolve(), chosen)
