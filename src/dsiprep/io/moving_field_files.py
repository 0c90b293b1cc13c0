"""Write how the off-resonance field changes with pitch and roll of the head."""

from __future__ import annotations

from pathlib import Path

from dsiprep.data.results import UnitResults
from dsiprep.io.nifti import write_image
from dsiprep.io.provenance import raw_uris
from dsiprep.io.qc_tables import write_json

__all__ = ["MOVING_FIELD", "write_moving_field"]

MOVING_FIELD = "_desc-moving_fieldmap"  # end of the name


def write_moving_field(session: Path, results: UnitResults) -> None:
    """Write both derivative fields, on the grid of the dwiref, and the angles of all volumes; nothing if rigid.

    Parameters
    ----------
    session : Path
        Folder of derivatives of a session.
    results : UnitResults
    """
    moving = results.moving_field
    values, unit = (None, "") if moving is None else moving.per_degree()
    if moving is None or values is None:
        return
    (session / "fmap").mkdir(exist_ok=True)
    stem = session / "fmap" / f"{results.unit.name}{MOVING_FIELD}"
    write_image(stem.with_name(f"{stem.name}.nii.gz"), values, moving.grid)
    sidecar = {
        "Units": unit,
        "Description": "Change of the off-resonance field in the head with its pitch and roll in the scanner: volume v "
        "has the field of desc-preproc_fieldmap plus Pitch[v] times the first and Roll[v] times the second image",
        "Volumes": ["pitch: turn about the x axis of the scanner", "roll: turn about the y axis of the scanner"],
        "Pitch": [round(float(angle), 4) for angle in moving.tilts[:, 0]],
        "Roll": [round(float(angle), 4) for angle in moving.tilts[:, 1]],
        "Evidence": round(moving.evidence, 2),
        "Sources": raw_uris(results.unit, [run.image for run in results.unit.runs]),
    }
    write_json(stem.with_name(f"{stem.name}.json"), sidecar)
