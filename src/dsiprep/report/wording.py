"""Human-readable names of methods and stages, and formatting of values."""

from __future__ import annotations

import numpy as np

from dsiprep.data.acquisition import PhaseEncoding
from dsiprep.data.grid import Grid

OUTLIER_HANDLING = {
    "report": "reported only; use --outliers replace to replace them by their prediction",
    "replace": "replaced by their prediction",
}
BLIPS = {"up": "blip-up", "down": "blip-down", "only": "single phase encoding"}
STAGES = {
    "acquisition": "Input",
    "gradients": "b-table check",
    "nonlinearity": "Gradient nonlinearity",
    "denoise": "Denoising",
    "unringing": "Gibbs ringing",
    "motion": "Head motion",
    "distortion": "Distortion",
    "slices": "Head motion",
    "dwiref": "Distortion",
    "anatomy": "Anatomy",
    "coregister": "Coregistration",
    "resample": "Resampling",
    "lattice": "q-space lattice",
    "quality": "Quality control",
}
DISTORTION_METHODS = {
    "drbuddi": "blip-up/blip-down (DRBUDDI model)",
    "gre": "gradient-echo fieldmap",
    "fieldmapless": "fieldmap-less, based on the tissue classes of the structural image",
    "tortoise": "blip-up/blip-down (DRBUDDI, TORTOISE)",
}
SIMILARITIES = {
    "mi": "Normalised mutual information",
    "cc": "Correlation of the b=0 images",
    "none": "Not applicable",
}
MOTION_MODELS = {
    "3dSHORE": "SHORELine, 3dSHORE model",
    "tensor": "SHORELine, tensor model",
    "none": "interpolated from the b=0 volumes",
    "off": "not corrected",
}


def describe_grid(grid: Grid) -> str:
    """Matrix and voxel size: "96 x 96 x 60 voxels of 2.2 x 2.2 x 2.5 mm"."""
    sizes = " x ".join(f"{size:.3g}" for size in grid.voxel_sizes)
    return f"{' x '.join(str(n) for n in grid.shape)} voxels of {sizes} mm"


def encoding(pe: PhaseEncoding | None, grid: Grid) -> str:
    """Phase encoding in voxel axes and anatomical directions: "j- (A to P), readout 51.2 ms"."""
    if pe is None:
        return "unknown"
    vector = grid.directions[:, pe.axis] * pe.polarity
    nearest = int(np.argmax(np.abs(vector)))
    ends = ("LR", "PA", "IS")[nearest]
    direction = f"{ends[0]} to {ends[1]}" if vector[nearest] > 0 else f"{ends[1]} to {ends[0]}"
    time = "readout time unknown" if pe.readout_time is None else f"readout {1000 * pe.readout_time:.3g} ms"
    return f"{pe.direction} ({direction}), {time}"


def number(value: object) -> str:
    """A float with four significant digits, other values as text, and "not available" for None, NaN and infinity."""
    if isinstance(value, float):
        return f"{value:.4g}" if np.isfinite(value) else "not available"
    return "not available" if value is None else str(value)


def duration(seconds: float) -> str:
    """A time span: "41 s", "6 min 12 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
