"""The template that nilearn ships, MNI152NLin2009aSym, as it is or warped to the space of MNI152NLin2009cAsym.

The displacement between the two spaces was computed once by dsiprep's own registration of the two T1w templates
(`benchmarks/template_spaces.py`, which also measures it) and is stored with the package at 3 mm.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from dsiprep.data.grid import Grid, Volume
from dsiprep.data.template import Template
from dsiprep.data.transform import DisplacementField
from dsiprep.errors import InputError
from dsiprep.io.nifti import read_volume
from dsiprep.ops.image.interpolation import resample_onto

__all__ = [
    "BUNDLED",
    "DEFAULT",
    "DISPLACEMENT",
    "bundled_files",
    "bundled_in_default_space",
    "bundled_template",
    "read_displacement",
]

DEFAULT = "MNI152NLin2009cAsym"
BUNDLED = "MNI152NLin2009aSym"
DEFAULT_GRID = Grid((193, 229, 193), np.array([[1.0, 0, 0, -96], [0, 1, 0, -132], [0, 0, 1, -78], [0, 0, 0, 1]]))
DISPLACEMENT = Path(__file__).with_name(f"{DEFAULT}_to_{BUNDLED}.npz")


def bundled_template() -> Template:
    """The ICBM152 2009a symmetric brain bundled with nilearn: T1w, GM and WM, scaled to 0..255."""
    files = bundled_files()
    t1w, gm, wm = (read_volume(file) for file in files)
    filled = ndimage.binary_fill_holes(t1w.numpy() > 0)
    mask = torch.from_numpy(np.asarray(filled, np.float32))
    gm_prior, wm_prior = gm.data / 255 * mask, wm.data / 255 * mask
    csf_prior = (mask - gm_prior - wm_prior).clamp(0, 1)
    tissue = torch.stack([csf_prior, gm_prior, wm_prior])
    return Template(BUNDLED, Volume(t1w.data * mask, t1w.grid), Volume(mask, t1w.grid), tissue, "nilearn", files)


def bundled_files() -> tuple[Path, ...]:
    """T1w, GM and WM of nilearn."""
    return tuple(_nilearn_file(part) for part in ("t1", "gm", "wm"))


@cache
def bundled_in_default_space() -> Template:
    """The bundled template resampled into the space and onto the grid of MNI152NLin2009cAsym, under that name."""
    bundled = bundled_template()
    field = read_displacement()
    displacement = resample_onto(field.data, field.grid, DEFAULT_GRID)
    assert bundled.tissue is not None
    images = torch.cat([bundled.brain.data[None], bundled.mask.data[None], bundled.tissue])
    images = resample_onto(images, bundled.brain.grid, DEFAULT_GRID, displacement=displacement)
    mask = (images[1] > 0.5).float()
    tissue = images[2:] * mask / images[2:].sum(0).clamp(min=1e-3)  # interpolation lowers them at the edge of the brain
    return replace(
        bundled,
        name=DEFAULT,
        brain=Volume(images[0] * mask, DEFAULT_GRID),
        mask=Volume(mask, DEFAULT_GRID),
        tissue=tissue,
        origin=f"{BUNDLED} of nilearn, warped to {DEFAULT}",
        files=(*bundled.files, DISPLACEMENT),
    )


def read_displacement() -> DisplacementField:
    """u in mm, RAS+: a point x of MNI152NLin2009cAsym corresponds to x + u(x) in MNI152NLin2009aSym."""
    with np.load(DISPLACEMENT) as stored:
        data = torch.from_numpy(stored["displacement"].astype(np.float32) * float(stored["unit_mm"]))
        i, j, k = data.shape[1:]
        return DisplacementField(data, Grid((i, j, k), stored["affine"]))


def _nilearn_file(part: str) -> Path:
    """Path of a file bundled with nilearn, located without importing nilearn, which would take seconds."""
    spec = importlib.util.find_spec("nilearn")
    file = f"mni_icbm152_{part}_tal_nlin_sym_09a_converted.nii.gz"
    if spec is None or spec.origin is None:
        raise InputError("no template: nilearn, which bundles one, is not installed; run `pip install nilearn`")
    path = Path(spec.origin).parent / "datasets" / "data" / file
    if not path.is_file():
        raise InputError(f"no template: {path} is missing; reinstall nilearn, or set TEMPLATEFLOW_HOME")
    return path
