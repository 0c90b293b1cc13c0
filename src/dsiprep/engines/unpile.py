"""Distortion without a fieldmap: the b=0 image against a structural one, by the program `unpile`.

`unpile` (MIT or Apache-2.0, `pip install unpile`) fits a displacement along the phase-encoding axis to the local
correlation of both images. dsiprep brings the structural image to the b=0 image first.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from dsiprep.data.acquisition import PhaseEncoding, Unit
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.results import Blip, Distortion
from dsiprep.errors import InputError, SettingsError
from dsiprep.io.nifti import read_volume, write_image
from dsiprep.ops.bias import n4_bias
from dsiprep.ops.linear import register_linear
from dsiprep.ops.mask import brain_mask_t1w
from dsiprep.ops.offresonance import unfolded
from dsiprep.ops.sample import pull
from dsiprep.settings import DistortionSettings
from dsiprep.stages.fieldmap import apply_shift

VERSION = 1
# knots down to 6 mm: a step to 3 mm costs several times as much and follows contrast rather than displacement
FIT = ("--metric", "lncc", "--levels", "24,12,6", "--iters", "30", "--lam-mm", "60")
SHRINK = 4  # receive bias misleads mutual information
LEAST_COVERED = 0.7
AROUND_MM = 8.0  # of the brain, where its rim tells of the pose

__all__ = ["VERSION", "check", "choose_structural", "correct_without_fieldmap", "structural_reference"]


def choose_structural(unit: Unit, settings: DistortionSettings) -> tuple[Path, bool] | None:
    """The structural image for fieldmap-less correction, and whether its contrast has to be inverted; None if none."""
    wanted = settings.anat_reference
    if wanted in ("auto", "t2w") and unit.t2w:
        return unit.t2w[0], False
    return (unit.t1w[0], True) if wanted in ("auto", "invt1w") and unit.t1w else None


def check() -> str:
    """Where the program is.

    Raises
    ------
    SettingsError
        If it is not installed.
    """
    place = shutil.which("unpile")
    if place is None:
        raise SettingsError(
            "--sdc-anat-reference: fieldmap-less correction is done by the program unpile, which is not on PATH; "
            "install it (pip install unpile), or leave the option out"
        )
    return place


def correct_without_fieldmap(
    blip: Blip, b0: torch.Tensor, grid: Grid, mask: Volume, structural: Volume, inverted: bool
) -> Distortion:
    """Displacement field of one phase encoding from a structural image.

    Parameters
    ----------
    blip : Blip
        With a direction and a readout time.
    b0 : Tensor, (m, i, j, k)
        Its aligned b=0 volumes on `grid`.
    grid : Grid
    mask : Volume
        Brain in them, 0 or 1.
    structural : Volume
        T2w or T1w, anywhere near.
    inverted : bool
        Whether its contrast is to be inverted: a T1w.

    Returns
    -------
    Distortion
        One blip; displacements that would fold the image are smoothed until none does.

    Raises
    ------
    SettingsError
        If the program is not installed.
    InputError
        If the readout time is not known, or the program fails.
    """
    program, pe = check(), blip.pe
    if pe is None or pe.readout_time is None:
        raise InputError(
            "fieldmap-less correction needs PhaseEncodingDirection and TotalReadoutTime of the DWI; add them to its "
            "sidecar, or run with --sdc-anat-reference none"
        )
    image = b0.float().cpu().mean(0)
    reference = structural_reference(Volume(image, grid), mask, structural, inverted)
    with tempfile.TemporaryDirectory(prefix="dsiprep-unpile-") as place:
        hertz = _fitted(program, Path(place), (image, reference.data, mask.data), grid, pe)
    shift = unfolded(hertz * (pe.readout_time * pe.polarity), pe.axis)
    return apply_shift(image, shift, grid, pe, [], "unpile")


def structural_reference(b0: Volume, mask: Volume, structural: Volume, inverted: bool) -> Volume:
    """The structural image on the grid of the b=0 image, its brain alone, cerebrospinal fluid bright.

    Parameters
    ----------
    b0, mask : Volume
        Distorted, and the brain in it.
    structural : Volume
    inverted : bool
        Whether to invert its contrast.

    Raises
    ------
    InputError
        If they cannot be aligned.
    """
    brain = brain_mask_t1w(structural)
    bias = n4_bias(structural, brain, SHRINK)
    structural = Volume(structural.data / bias.data, structural.grid)
    outside = ndimage.distance_transform_edt(brain.numpy() < 0.5, sampling=structural.grid.voxel_sizes)
    near = Volume(torch.from_numpy((outside <= AROUND_MM).astype(np.float32)), structural.grid)
    fit = register_linear(b0, structural, fixed_mask=near, moving_mask=mask)
    to_structural = np.linalg.inv(fit.matrix)
    both = torch.stack([structural.data.float(), brain.data.float()])
    there, inside = pull(both, structural.grid, b0.grid, to_structural)
    if inverted:
        top = float(np.percentile(structural.numpy()[brain.numpy() > 0.5], 99))
        there = (top - there).clamp(min=0)
    covered = float((inside[mask.data > 0.5] > 0.5).float().mean())
    if covered < LEAST_COVERED:
        raise InputError(
            f"the structural image could not be aligned with the distorted b=0: its brain covers {covered:.0%} of the "
            "other's; run with --sdc-anat-reference none"
        )
    return Volume((there * inside).contiguous(), b0.grid)


def _fitted(program: str, place: Path, images: tuple[torch.Tensor, ...], grid: Grid, pe: PhaseEncoding) -> np.ndarray:
    """The field in Hz, (i, j, k)."""
    names = [place / f"{name}.nii.gz" for name in ("epi", "reference", "mask")]
    for path, data in zip(names, images, strict=True):
        write_image(path, data, grid)
    command = [program, "--threads", str(torch.get_num_threads()), "fit", "--epi", str(names[0]), "--reference",
               str(names[1]), "--mask", str(names[2]), "--pe-dir", pe.direction, "--total-readout-time",
               str(pe.readout_time), *FIT, "--out", str(place / "out")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = place / "out" / "field_hz.nii.gz"
    if done.returncode or not found.is_file():
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["it said nothing"]
        raise InputError(
            f"unpile ended with code {done.returncode}: {last[0]}; run with --sdc-anat-reference none to go on without"
        )
    return read_volume(found).numpy()
