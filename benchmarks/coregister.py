"""How well series of one person come together, and from how far: `python benchmarks/coregister.py people|starts ...`.

`people BIDS OUT LABEL` compares the b=0 references that dsiprep wrote for the series of a person without structural
image: their correlation with the series that leads, in the scanner's coordinates and after. Images are read and
resampled by SimpleITK, which shares nothing with dsiprep. `starts BIDS WORK LABEL` moves the b=0 reference of each
series by rigid transforms of up to 30 degrees and 50 mm in its header, cuts off part of it where asked, registers it
again, and compares with what was found from the header as it is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813

from dsiprep.cache import Cache
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.results import UnitResults
from dsiprep.io.bids import find_units
from dsiprep.io.itk import read_affine
from dsiprep.ops.image.affine import point_displacement, rigid_matrix
from dsiprep.ops.intensity.brain_mask import brain_mask_b0
from dsiprep.pipeline import preprocess
from dsiprep.plan import choose_lead
from dsiprep.settings import CoregisterSettings, ResampleSettings, Settings
from dsiprep.stages.coregister import coregister
from dsiprep.stages.dwiref import reference_image

COREG = "_from-dwiref_to-ACPC_mode-image_desc-coreg_xfm.txt"


def correlation(image: sitk.Image, fixed: sitk.Image, mask: np.ndarray, to_image: sitk.Transform) -> float:
    """Of an image with the fixed one in the fixed one's brain, as far as the image reaches."""
    brought = sitk.GetArrayFromImage(sitk.Resample(image, fixed, to_image, sitk.sitkBSpline, -1e6, sitk.sitkFloat32))
    inside = mask & (brought > -1e5)
    return float(np.corrcoef(brought[inside], sitk.GetArrayFromImage(fixed)[inside])[0, 1])


def first_b0(path: Path) -> sitk.Image:
    """The first volume of a series."""
    series = sitk.ReadImage(str(path), sitk.sitkFloat32)
    return sitk.Extract(series, [*series.GetSize()[:3], 0], [0, 0, 0, 0])


def people(bids: Path, out: Path, label: str, lead: str) -> None:
    """One row for each series."""
    names = sorted(path.name.removesuffix(COREG) for path in (out / f"sub-{label}").rglob(f"*{COREG}"))
    where = {name: next(out.rglob(f"{name}{COREG}")).parent for name in names}
    fixed = sitk.ReadImage(str(where[lead] / f"{lead}_space-ACPC_dwiref.nii.gz"), sitk.sitkFloat32)
    mask = sitk.ReadImage(str(where[lead] / f"{lead}_space-ACPC_desc-brain_mask.nii.gz"))
    inside = sitk.GetArrayFromImage(mask) > 0.5
    to_scanner = sitk.ReadTransform(str(where[lead] / f"{lead}{COREG}"))
    print("| series | scanner's coordinates | in ACPC space | turned by | moved by |\n|---|---|---|---|---|")
    for name in names:
        raw = first_b0(min((bids / f"sub-{label}").rglob(f"{name}*_dwi.nii.gz")))
        before = correlation(raw, fixed, inside, to_scanner)
        done = sitk.ReadImage(str(where[name] / f"{name}_space-ACPC_dwiref.nii.gz"), sitk.sitkFloat32)
        covered = sitk.Resample(
            sitk.ReadImage(str(where[name] / f"{name}_space-ACPC_desc-brain_mask.nii.gz")), fixed, sitk.Transform(),
            sitk.sitkNearestNeighbor,
        )  # fmt: skip
        after = correlation(done, fixed, inside & (sitk.GetArrayFromImage(covered) > 0), sitk.Transform())
        first, own = (read_affine(where[n] / f"{n}{COREG}").matrix for n in (lead, name))
        moved = own @ np.linalg.inv(first)
        turn = np.degrees(np.arccos(np.clip((np.trace(moved[:3, :3]) - 1) / 2, -1, 1)))
        shift = point_displacement(own[None], first[None], np.zeros((1, 3)))[0, 0]
        print(f"| {name} | {before:.3f} | {after:.3f} | {turn:.1f}° | {shift:.1f} mm |")


def random_rigid(rng: np.random.Generator, centre: np.ndarray) -> np.ndarray:
    """Up to 30 degrees about any axis through `centre`, and up to 50 mm."""
    axis, way = rng.normal(size=3), rng.normal(size=3)
    turn = np.radians(rng.uniform(0, 30)) * axis / np.linalg.norm(axis)
    return rigid_matrix(np.concatenate([turn, rng.uniform(0, 50) * way / np.linalg.norm(way)]), centre)


def cut(dwiref: Volume, keep: float, top: bool) -> Volume:
    """The upper or lower part of the slices."""
    count = dwiref.grid.shape[2]
    first = round(count * (1 - keep)) if top else 0
    last = count if top else round(count * keep)
    affine = dwiref.grid.affine.copy()
    affine[:3, 3] = dwiref.grid.to_world(np.array([0, 0, first]))
    data = dwiref.data[:, :, first:last].contiguous()
    return Volume(data, Grid((data.shape[0], data.shape[1], data.shape[2]), affine))


def errors(results: UnitResults, count: int, keep: float, seed: int) -> np.ndarray:
    """Mean distance in the brain, in mm, between what is found from each start and from the header as it is."""
    rng = np.random.default_rng(seed)
    dwiref = reference_image(results.motions[0], results.distortion).dwiref
    mask, reference = results.anatomy.mask, results.coregistration
    brain = mask.grid.to_world(np.argwhere(mask.numpy() > 0.5)[::500])
    found = []
    for number in range(count):
        part = cut(dwiref, keep, number % 2 == 0) if keep < 1 else dwiref
        move = random_rigid(rng, dwiref.grid.centre)
        moved = Volume(part.data, Grid(part.grid.shape, move @ part.grid.affine))
        fit = coregister(moved, brain_mask_b0(moved), results.anatomy, CoregisterSettings(), reference.target_unit)
        matrix = np.linalg.inv(move) @ fit.dwiref_to_acpc.matrix
        found.append(point_displacement(matrix[None], reference.dwiref_to_acpc.matrix[None], brain).mean())
    return np.array(found)


def starts(bids: Path, work: Path, label: str, count: int, keep: float, seed: int) -> None:
    """One row for each series; the stages before are found in WORK or computed."""
    settings = Settings(resample=ResampleSettings(3.0))
    units = find_units(bids, settings, participants=[label])
    print("| series | starts | within 2 mm | median mm | largest mm |\n|---|---|---|---|---|")
    for unit in units:
        results = preprocess(unit, settings, Cache(work / f"sub-{label}"), "cpu", choose_lead(unit, units, settings))
        if results.coregistration.metric != "none":
            mm = errors(results, count, keep, seed)
            good = int((mm < 2).sum())
            print(f"| {unit.name} | {count} | {good} | {np.median(mm):.2f} | {mm.max():.2f} |", flush=True)


def main() -> None:
    """Which table."""
    parser = argparse.ArgumentParser(description=__doc__)
    tables = parser.add_subparsers(dest="table", required=True)
    for name, folder in (("people", "out"), ("starts", "work")):
        table = tables.add_parser(name)
        table.add_argument("bids", type=Path)
        table.add_argument(folder, type=Path)
        table.add_argument("label")
    tables.choices["people"].add_argument("--lead", required=True, help="name of the series the others were brought to")
    tables.choices["starts"].add_argument("--count", type=int, default=20)
    tables.choices["starts"].add_argument("--keep", type=float, default=1.0, help="share of the slices that is left")
    tables.choices["starts"].add_argument("--seed", type=int, default=0)
    o = parser.parse_args()
    if o.table == "people":
        people(o.bids, o.out, o.label, o.lead)
    else:
        starts(o.bids, o.work, o.label, o.count, o.keep, o.seed)


if __name__ == "__main__":
    main()
