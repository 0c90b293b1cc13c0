"""dsiprep: preprocessing of diffusion spectrum imaging, and of any other q-space sampling.

    from dsiprep import ResampleSettings, Settings, find_units, preprocess, write_derivatives

    settings = Settings(resample=ResampleSettings(resolution=2.0))
    for unit in find_units("bids", settings):
        write_derivatives(preprocess(unit, settings), "derivatives")

Names are imported on first use, so `import dsiprep` is cheap.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsiprep.api.acting_gradients import acting_gradients
    from dsiprep.api.add_normalization import add_normalization
    from dsiprep.api.blip_pair import correct_pair, write_pair
    from dsiprep.api.convert_warp import convert_warp
    from dsiprep.api.shoreline import align_series, estimate_motion
    from dsiprep.cache import Cache
    from dsiprep.errors import (
        DsiprepError,
        EngineError,
        GradientError,
        InputError,
        MetadataError,
        OutputError,
        SettingsError,
    )
    from dsiprep.io.bids import find_units
    from dsiprep.outputs import write_derivatives, write_report
    from dsiprep.pipeline import preprocess
    from dsiprep.plan import choose_lead
    from dsiprep.settings import (
        AcquisitionSettings,
        AnatomySettings,
        CoregisterSettings,
        DenoiseSettings,
        DistortionSettings,
        GradientSettings,
        LatticeSettings,
        MotionSettings,
        NonlinearitySettings,
        ResampleSettings,
        Settings,
        UnringingSettings,
    )

# Waiting threads sleep instead of spinning: on a shared machine spinning cost three times the CPU time, and more wall
# time too. This has to be set before torch or Numba load OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy works on small matrices only

__version__ = version("dsiprep")
__all__ = [
    "AcquisitionSettings",
    "AnatomySettings",
    "Cache",
    "CoregisterSettings",
    "DenoiseSettings",
    "DistortionSettings",
    "DsiprepError",
    "EngineError",
    "GradientError",
    "GradientSettings",
    "InputError",
    "LatticeSettings",
    "MetadataError",
    "MotionSettings",
    "NonlinearitySettings",
    "OutputError",
    "ResampleSettings",
    "Settings",
    "SettingsError",
    "UnringingSettings",
    "__version__",
    "acting_gradients",
    "add_normalization",
    "align_series",
    "choose_lead",
    "convert_warp",
    "correct_pair",
    "estimate_motion",
    "find_units",
    "preprocess",
    "write_derivatives",
    "write_pair",
    "write_report",
]

_MODULES = {
    "dsiprep.cache": ("Cache",),
    "dsiprep.errors": (
        "DsiprepError",
        "EngineError",
        "GradientError",
        "InputError",
        "MetadataError",
        "OutputError",
        "SettingsError",
    ),
    "dsiprep.io.bids": ("find_units",),
    "dsiprep.outputs": ("write_derivatives", "write_report"),
    "dsiprep.pipeline": ("preprocess",),
    "dsiprep.plan": ("choose_lead",),
    "dsiprep.settings": (
        "AcquisitionSettings",
        "AnatomySettings",
        "CoregisterSettings",
        "DenoiseSettings",
        "DistortionSettings",
        "GradientSettings",
        "LatticeSettings",
        "GradientSettings",
        "LatticeSettings",
        "MotionSettings",
        "NonlinearitySettings",
        "ResampleSettings",
        "Settings",
        "UnringingSettings",
    ),
    "dsiprep.api.acting_gradients": ("acting_gradients",),
    "dsiprep.api.add_normalization": ("add_normalization",),
    "dsiprep.api.blip_pair": ("correct_pair", "write_pair"),
    "dsiprep.api.convert_warp": ("convert_warp",),
    "dsiprep.api.shoreline": ("align_series", "estimate_motion"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'dsiprep' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
