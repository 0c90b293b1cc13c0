"""dsiprep: preprocessing of diffusion spectrum imaging, and any other q-space sampling.

    from dsiprep import Settings, find_units, preprocess
    results = preprocess(find_units("bids", Settings())[0], Settings())

Names are loaded when they are first used, so that `import dsiprep` costs nothing.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsiprep.io.bids import find_units, read_unit
    from dsiprep.pipeline import preprocess
    from dsiprep.settings import Settings
    from dsiprep.standalone.blip_pair import correct_pair
    from dsiprep.standalone.shoreline import align_series, estimate_motion

# Threads that wait sleep rather than spin. On a shared machine spinning cost three times the CPU time and more of wall
# time. It has to be set before torch or Numba load OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy: small matrices only

__version__ = version("dsiprep")
__all__ = [
    "Settings",
    "__version__",
    "align_series",
    "correct_pair",
    "estimate_motion",
    "find_units",
    "preprocess",
    "read_unit",
]

_HOMES = {
    "correct_pair": "dsiprep.standalone.blip_pair",
    "Settings": "dsiprep.settings",
    "align_series": "dsiprep.standalone.shoreline",
    "estimate_motion": "dsiprep.standalone.shoreline",
    "find_units": "dsiprep.io.bids",
    "preprocess": "dsiprep.pipeline",
    "read_unit": "dsiprep.io.bids",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dsiprep' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
