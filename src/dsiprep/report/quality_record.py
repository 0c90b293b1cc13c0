"""Metrics and verdicts of a series as one JSON file, in the form of MRIQC's files of image quality metrics."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from dsiprep.data.results import UnitResults
from dsiprep.io.quality_columns import column_meaning
from dsiprep.report.page_parts import write_atomically
from dsiprep.report.verdicts import CHECKS, Verdict

SUFFIX = "_desc-quality_dwi.json"
ENTITIES = {
    "subject_id": "sub",
    "session_id": "ses",
    "acq_id": "acq",
    "dir_id": "dir",
    "run_id": "run",
    "rec_id": "rec",
}
SCHEMA = {
    "bids_meta": "BIDS entities of the series",
    "provenance": "Software, version, settings that differ from the defaults, seconds by stage",
    "verdicts": "Checks of the report: state (bad, look, fine, not measured), value, bounds and their source, reason",
}


def write_record(results: UnitResults, verdicts: Sequence[Verdict], out: Path, version: str) -> Path:
    """Write `out/sub-X/figures/<unit>_desc-quality_dwi.json`.

    The metrics are at the top level, as in MRIQC's files: the columns of image_qc.tsv and, as `check_<key>`, the value
    of each check. `descriptions` explains every entry.
    """
    table = results.quality.table
    metrics = {name: _finite(v) for name, v in table.items() if not name.endswith("_id") and name != "file_name"}
    metrics |= {f"check_{verdict.key}": _finite(verdict.value) for verdict in verdicts}
    titles = {f"check_{check.key}": f"{check.title}{f' ({check.unit})' if check.unit else ''}" for check in CHECKS}
    record = {
        **metrics,
        "bids_meta": {entity: table[name] for name, entity in ENTITIES.items() if table.get(name)},
        "provenance": {
            "software": "dsiprep",
            "version": version,
            "series": results.unit.name,
            "sampling_scheme": results.acquired.scheme.description,
            "device": results.device,
            "seconds": {name: round(value, 1) for name, value in results.seconds.items()},
        },
        "verdicts": [verdict.as_record() for verdict in verdicts],
        "descriptions": {name: titles.get(name) or column_meaning(name) for name in metrics} | SCHEMA,
    }
    path = out / f"sub-{results.unit.subject}" / "figures" / f"{results.unit.name}{SUFFIX}"
    return write_atomically(path, (json.dumps(record, indent=2, allow_nan=False) + "\n").encode())


def _finite(value: float | str | None) -> float | str | None:
    """The value, with None in place of NaN and infinity, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
