"""Where outputs come from: dataset_description.json, BIDS URIs of sources and of the image that defines a space."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from dsiprep.data.acquisition import Unit
from dsiprep.data.results import UnitResults
from dsiprep.errors import MetadataError
from dsiprep.io.files import read_json
from dsiprep.settings import AnatomySettings

__all__ = ["anatomical_uri", "anatomy_stem", "dataset_description", "raw_root", "raw_uris", "space_uri"]

CODE_URL = "https://github.com/dsiprep/dsiprep"
FROM_RAW = ("DatasetLinks", "SourceDatasets", "License")


def dataset_description(out: Path, version: str, raw: Path | None) -> dict[str, object]:
    """Content of dataset_description.json of the derivatives in `out`.

    `DatasetLinks` gives the dataset that `bids:raw:` stands for, as a path relative to `out`, and the licence is that
    of the raw dataset, from which derivatives are made. With `raw` None these fields are kept as they are.
    """
    description: dict[str, object] = {
        "Name": "dsiprep - preprocessed diffusion MRI",
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "dsiprep", "Version": version, "CodeURL": CODE_URL}],
        "HowToAcknowledge": "Please cite the methods listed in logs/CITATION.md.",
    }
    if raw is None:
        before = _read(out / "dataset_description.json")
        return description | {name: before[name] for name in FROM_RAW if name in before}
    link, of_raw = (
        Path(os.path.relpath(raw.resolve(), out.resolve())).as_posix(),
        _read(raw / "dataset_description.json"),
    )
    source = {"URL": link, "DOI": of_raw.get("DatasetDOI"), "Version": of_raw.get("DatasetVersion")}
    description["DatasetLinks"] = {"raw": link}
    description["SourceDatasets"] = [{name: value for name, value in source.items() if value}]
    return description | ({"License": of_raw["License"]} if of_raw.get("License") else {})


def _read(path: Path) -> dict[str, object]:
    try:
        return read_json(path)
    except MetadataError:
        return {}


def raw_root(unit: Unit) -> Path | None:
    """The dataset that a unit's files are in: the folder that contains sub-<label>; None if there is none."""
    return next((folder.parent for folder in unit.runs[0].image.parents if folder.name == f"sub-{unit.subject}"), None)


def raw_uris(unit: Unit, files: Iterable[Path]) -> list[str]:
    """BIDS URIs of files of the raw dataset, in order and each once."""
    root = raw_root(unit)
    relative = [file.relative_to(root) if root and file.is_relative_to(root) else Path(file.name) for file in files]
    return [f"bids:raw:{path.as_posix()}" for path in dict.fromkeys(relative)]


def anatomy_stem(unit: Unit, settings: AnatomySettings) -> str:
    """Folder and file name prefix of the structural files of a unit, per subject or, sessionwise, per session."""
    subject = f"sub-{unit.subject}"
    if unit.session is None or settings.reference != "sessionwise":
        return f"{subject}/anat/{subject}"
    return f"{subject}/ses-{unit.session}/anat/{subject}_ses-{unit.session}"


def anatomical_uri(unit: Unit, settings: AnatomySettings, modality: str) -> str:
    """BIDS URI of the structural image in ACPC space."""
    return f"bids::{anatomy_stem(unit, settings)}_space-ACPC_desc-preproc_{modality}.nii.gz"


def space_uri(results: UnitResults) -> str:
    """BIDS URI of the image that defines ACPC space for a unit: the structural one or the leading b=0 reference."""
    modality = results.anatomy.modality
    if modality != "none":
        return anatomical_uri(results.unit, results.settings.anatomy, modality)
    lead = results.coregistration.target_unit or results.unit.output or results.unit.name
    session = next((part for part in lead.split("_")[1:2] if part.startswith("ses-")), "")
    folder = "/".join(part for part in (f"sub-{results.unit.subject}", session, "dwi") if part)
    return f"bids::{folder}/{lead}_space-ACPC_dwiref.nii.gz"
