"""Output folders of many simulated subjects, each with the quality file and the thumbnail of a series."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def make_cohort(
    out: Path,
    record: Path,
    count: int,
    faults: Mapping[str, Mapping[str, float]] | None = None,
    scale: Mapping[str, float] | None = None,
) -> None:
    """Write `count` subjects whose metrics are those of `record`, spread by 15 %; `faults` sets some by subject."""
    content = json.loads(record.read_text())
    thumbnail = record.with_name(record.name.replace("_desc-quality_dwi.json", "_desc-thumbnail_dwi.webp")).read_bytes()
    rng = np.random.default_rng(count)
    for number in range(count):
        subject = f"sub-{number:04d}"
        folder = out / subject / "figures"
        folder.mkdir(parents=True)
        own = {
            name: value * float(np.exp(rng.normal(0, 0.15))) * (scale or {}).get(name, 1.0)
            if isinstance(value, float)
            else value
            for name, value in content.items()
        }
        own |= (faults or {}).get(subject, {})
        (folder / f"{subject}_acq-dsi_desc-quality_dwi.json").write_text(json.dumps(own))
        (folder / f"{subject}_acq-dsi_desc-thumbnail_dwi.webp").write_bytes(thumbnail)
