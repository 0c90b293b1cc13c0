"""Write a series on a lattice in q-space beside the preprocessed series.

Its suffix is `dwimap`, as for other maps from a model: QSIRecon reconstructs every image of suffix `dwi` in ACPC space.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dsiprep.data.grid import Volume
from dsiprep.data.qspace import Lattice
from dsiprep.io.gradients import write_every_frame
from dsiprep.io.nifti import ALIGNED, write_image
from dsiprep.io.qc_tables import write_json

__all__ = ["write_lattice"]


def write_lattice(folder: Path, owner: str, lattice: Lattice, mask: Volume, sidecar: Mapping[str, object]) -> None:
    """Write the volumes, their gradient tables and a sidecar with their errors.

    Parameters
    ----------
    folder : Path
    owner : str
        Prefix of the output.
    lattice : Lattice
    mask : Volume
        Brain; its signal at b=0 is the unit of errors.
    sidecar : mapping
        Of the preprocessed series, from which the space is taken.
    """
    dwi, stem = lattice.dwi, folder / f"{owner}_space-ACPC_desc-lattice_dwimap"
    reference = float(np.median(dwi.data[int(np.argmin(dwi.bvals))].cpu().numpy()[mask.numpy() > 0.5]))
    parts = folder.parts
    inside = "/".join(parts[max(n for n, part in enumerate(parts) if part.startswith("sub-")) :])
    write_image(stem.with_name(f"{stem.name}.nii.gz"), dwi.data, dwi.grid, space=ALIGNED)
    content = {
        "Description": "The preprocessed series evaluated at the points of a lattice in q-space along the image axes",
        "SpatialReference": sidecar["SpatialReference"],
        "SkullStripped": False,
        "Sources": [f"bids::{inside}/{owner}_space-ACPC_desc-preproc_dwi.nii.gz"],
        "SignalModel": lattice.model,
        "LatticePoints": lattice.points.tolist(),
        "Noise": lattice.noise / reference,
        "LeftOutError": float(np.sqrt(np.mean(lattice.left_out**2))) / reference,
        "Uncertainty": [round(float(value), 4) for value in lattice.uncertainty],
        "Extrapolated": [int(v) for v in np.flatnonzero(lattice.extrapolated)],
        "Units": "Noise and LeftOutError (RMS over acquired volumes, each predicted from the others) as fractions of "
        "the median b=0 signal of the brain; Uncertainty as standard deviation in units of Noise; Extrapolated as "
        "volumes from 0 that lie outside the acquired q-space or are less certain than an acquired volume",
        "GradientTables": write_every_frame(stem, dwi),
    }
    write_json(stem.with_name(f"{stem.name}.json"), content)
