"""What scanners corrected of gradient nonlinearity, from ImageType and NonlinearGradientCorrection of sidecars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsiprep.data.acquisition import Unit
from dsiprep.data.gradient_coil import ScannerCorrections
from dsiprep.errors import InputError, MetadataError
from dsiprep.io.sidecar_files import SidecarFiles

__all__ = ["correction_of", "corrections_of"]

OPTION = "--scanner-gradwarp"
SIEMENS = {"DIS3D": "3d", "DIS2D": "2d", "ND": "none"}  # values of ImageType
BY_ACQUISITION = {"2D": "2d", "3D": "3d"}  # scanners correct two-dimensional acquisitions within slices


def corrections_of(unit: Unit, modality: str, chosen: str) -> ScannerCorrections:
    """What the scanner corrected in the images of a unit.

    Parameters
    ----------
    unit : Unit
    modality : str
        Of the structural images that are used: "T1w", "T2w" or "none".
    chosen : str
        "auto", or "none", "2d" or "3d" for all images.

    Raises
    ------
    MetadataError
        With "auto", if the sidecars of an image do not tell.
    InputError
        If runs or EPI references differ.
    """
    series = _shared([run.image for run in unit.runs], chosen)
    epis = _shared([epi.image for epi in unit.epis], chosen) if unit.epis else series
    gre = _shared(unit.gre.files(), chosen) if unit.gre else "none"
    structural = tuple(_shared([path], chosen) for path in unit.structural(modality))
    return ScannerCorrections(series, epis, gre, structural, unit.runs[0].k_space.slice_axis)


def correction_of(metadata: Mapping[str, Any], name: str, chosen: str = "auto") -> str:
    """What the scanner corrected in one image: "none", "2d" (within slices) or "3d".

    Raises
    ------
    MetadataError
        With "auto", if neither field tells.
    """
    if chosen != "auto":
        return chosen
    kinds = metadata.get("ImageType")
    values = kinds.split("\\") if isinstance(kinds, str) else list(kinds) if isinstance(kinds, list | tuple) else []
    found = [SIEMENS[value] for value in SIEMENS if value in values]
    if found:
        return found[0]
    flag = str(metadata.get("NonlinearGradientCorrection", "")).lower()
    if flag == "false":
        return "none"
    acquisition = str(metadata.get("MRAcquisitionType", "")).upper()
    if flag == "true" and acquisition in BY_ACQUISITION:
        return BY_ACQUISITION[acquisition]
    lacking = (
        "MRAcquisitionType does not tell in how many dimensions" if flag == "true" else "neither is in its sidecar"
    )
    raise MetadataError(
        f"{name}: whether the scanner corrected gradient nonlinearity is known from ImageType (ND, DIS2D, DIS3D) or "
        f"NonlinearGradientCorrection, but {lacking}; add them, or give {OPTION} none, 2d or 3d"
    )


def _shared(images: Sequence[Path], chosen: str) -> str:
    found = {correction_of(_metadata(path), path.name, chosen): path.name for path in images}
    if len(found) > 1:
        listed = ", ".join(f"{name}: {kind}" for kind, name in found.items())
        raise InputError(
            f"the scanner's correction of gradient nonlinearity differs between images that are processed together "
            f"({listed}); exclude some with --bids-filter-file, or state what is right for all with {OPTION}"
        )
    return next(iter(found))


def _metadata(path: Path) -> dict[str, Any]:
    """Fields of all sidecars that apply to an image of a dataset."""
    subject = next((parent for parent in path.parents if parent.name.startswith("sub-")), path.parent)
    return SidecarFiles(subject.parent).metadata(str(path))
