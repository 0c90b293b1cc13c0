"""Values in plain words: what people read instead of codes, and the names of things."""

from __future__ import annotations

import numpy as np

from dsiprep.data.acquisition import PhaseEncoding
from dsiprep.data.grid import Grid

LOST = {"report": "left as they are; --outliers replace takes the prediction", "replace": "replaced by the prediction"}
BLIPS = {"up": "blip-up", "down": "blip-down", "only": "the only phase encoding"}
STAGES = {
    "acquisition": "Reading",
    "denoise": "Denoising",
    "motion": "Head motion",
    "distortion": "Distortion",
    "anatomy": "Anatomy",
    "coregister": "Coregistration",
    "resample": "Resampling",
    "quality": "Quality",
}
METHODS = {
    "drbuddi": "blip-up/blip-down (DRBUDDI model)",
    "gre": "gradient-echo fieldmap",
    "fieldmapless": "without a fieldmap, against the tissues of the structural image",
    "tortoise": "DRBUDDI of TORTOISE",
}
SCORES = {
    "mi": "Normalised mutual information",
    "cc": "Correlation of the b=0 images",
    "none": "Not needed",
}
MODELS = {
    "3dSHORE": "SHORELine, 3dSHORE model",
    "tensor": "SHORELine, tensor model",
    "none": "from the b=0 volumes",
    "off": "not corrected",
}


def in_words(grid: Grid) -> str:
    """ "96 x 96 x 60 voxels of 2.2 x 2.2 x 2.5 mm"."""
    sizes = " x ".join(f"{size:.3g}" for size in grid.voxel_sizes)
    return f"{' x '.join(str(n) for n in grid.shape)} voxels of {sizes} mm"


def encoding(pe: PhaseEncoding | None, grid: Grid) -> str:
    """ "j- (A to P), readout 51.2 ms": in anatomical words, so that nobody has to know the file's axes."""
    if pe is None:
        return "unknown"
    along = grid.directions[:, pe.axis] * pe.polarity
    main = int(np.argmax(np.abs(along)))
    ends = ("LR", "PA", "IS")[main]
    way = f"{ends[0]} to {ends[1]}" if along[main] > 0 else f"{ends[1]} to {ends[0]}"
    time = "readout time unknown" if pe.readout_time is None else f"readout {1000 * pe.readout_time:.3g} ms"
    return f"{pe.direction} ({way}), {time}"


def number(value: object) -> str:
    """Four digits of a number; "not available" for what was not measured."""
    if isinstance(value, float):
        return f"{value:.4g}" if np.isfinite(value) else "not available"
    return "not available" if value is None else str(value)


def duration(seconds: float) -> str:
    """ "41 s", "6 min 12 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
