"""Find the images of a subject in a BIDS dataset, and say of every image that is not used why.

Folders are read at their fixed depth, `sub-<label>/[ses-<label>/]<anat|dwi|fmap>`, so that neither the name of the
root nor a link to a parent folder matters.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from dsiprep.errors import InputError, printable
from dsiprep.io.bids_filters import entities

LABEL = re.compile(r"[0-9A-Za-z+]+")
DATATYPES = ("anat", "dwi", "fmap")
IMAGE_LIKE = re.compile(r"\.(nii(\.\w+)?|img|hdr|mgz|mgh|nrrd|mnc)(\.gz)?$", re.IGNORECASE)
FIELDMAP_SUFFIXES = ("epi", "fieldmap", "phasediff", "phase1", "phase2", "magnitude", "magnitude1", "magnitude2")
USED_SUFFIXES = {"anat": ("T1w", "T2w"), "dwi": ("dwi", "sbref"), "fmap": (*FIELDMAP_SUFFIXES, "dwi", "sbref")}
CARTESIAN = ("real", "imag")
PARTS = ("mag", "phase", *CARTESIAN)
REFERENCES = (("dwi", "sbref"), ("fmap", "dwi"), ("fmap", "sbref"))  # EPI images that can only show the distortion


@dataclass(frozen=True)
class SubjectImages:
    """Images of one subject.

    Attributes
    ----------
    by_kind : dict
        Sorted paths by kind ("dwi", "fmap", "t1w", "t2w", "reference"): magnitudes, or real parts of complex series.
    phases : dict
        What makes an image complex: its phase image if it is a magnitude, its imaginary part if it is a real part.
    unused : dict
        Why an image is not used, by path.
    notes : dict
        What was unusual about a used image, by path.
    """

    by_kind: dict[str, list[str]]
    phases: dict[str, str] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


class DatasetFiles:
    """The subjects, sessions and images below the root of a BIDS dataset."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root).resolve()

    def subjects(self) -> list[str]:
        """Labels of the sub-* folders, sorted, including those that are not valid in BIDS."""
        return sorted(name.removeprefix("sub-") for name in _folders(self.root) if name.startswith("sub-"))

    def sessions(self, label: str) -> list[str]:
        """Labels of the ses-* folders of a subject, sorted."""
        return sorted(
            name.removeprefix("ses-") for name in _folders(self.root / f"sub-{label}") if name.startswith("ses-")
        )

    def images(self, label: str) -> SubjectImages:
        """The images of one subject in anat, dwi and fmap.

        Raises
        ------
        InputError
            If the label of the subject or of a session is not valid, or a folder cannot be read.
        """
        check_label("sub", label, self.root / f"sub-{label}")
        subject = self.root / f"sub-{label}"
        found = SubjectImages({kind: [] for kind in ("dwi", "fmap", "t1w", "t2w", "reference")})
        for session in (None, *self.sessions(label)):
            if session is not None:
                check_label("ses", session, subject / f"ses-{session}")
            parent = subject / f"ses-{session}" if session is not None else subject
            for datatype in DATATYPES:
                if (parent / datatype).is_dir():
                    _sort_folder(parent / datatype, datatype, label, found)
        for paths in found.by_kind.values():
            paths.sort()
        return found


def check_label(key: str, label: str, path: Path) -> None:
    """Raise an InputError unless a label has only the characters that BIDS allows."""
    if not LABEL.fullmatch(label):
        suggestion = re.sub(r"[^0-9A-Za-z+]", "", label) or "01"
        raise InputError(
            f"{path}: the label {label!r} is not valid in BIDS, which allows letters and digits; "
            f"rename the folder and its files to {key}-{suggestion}"
        )


def _folders(parent: Path) -> list[str]:
    try:
        with os.scandir(parent) as entries:
            return [entry.name for entry in entries if entry.is_dir()]
    except OSError as error:
        raise InputError(f"{parent}: {(error.strerror or 'cannot be read').lower()}") from None


def _sort_folder(folder: Path, datatype: str, label: str, found: SubjectImages) -> None:
    """Add the images of one datatype folder to `found`."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder}: {(error.strerror or 'cannot be read').lower()}") from None
    images = [name for name in names if IMAGE_LIKE.search(name) and not name.startswith(".")]
    parts: dict[tuple[tuple[str, str], ...], dict[str, str]] = {}
    for name in images:
        path = str(folder / name)
        if reason := _why_unused(name, datatype, label, images):
            found.unused[path] = reason
            continue
        values = entities(name)
        if datatype == "anat" and "." in stem(name):
            found.notes[path] = f"{name}: BIDS allows no dot in a label; rename the file."
        part = values.pop("part", "mag")
        members = parts.setdefault(tuple(sorted(values.items())), {})
        if part not in PARTS or (part in CARTESIAN and datatype != "dwi"):
            found.unused[path] = f"part-{part} of a complex image; of {datatype}/ only magnitudes are used"
            continue
        if part in members:
            found.unused[path] = f"{Path(members[part]).name} of the same acquisition is used"
        members.setdefault(part, path)
    for members in parts.values():
        _add_acquisition(members, datatype, found)


def _why_unused(name: str, datatype: str, label: str, images: list[str]) -> str:
    """Why an image cannot be used, from its name; empty if it can."""
    if printable(name) != name:
        return "its name is not UTF-8; rename it"
    if not name.endswith((".nii", ".nii.gz")):
        return "its name does not end in .nii or .nii.gz; convert or rename it"
    values, suffix = entities(name), entities(name).get("suffix", "")
    if values.get("sub") != label:
        return f"its name does not start with sub-{label}; rename it"
    if suffix not in USED_SUFFIXES[datatype]:
        used = " and ".join(("the epi and GRE fieldmaps",) if datatype == "fmap" else USED_SUFFIXES[datatype])
        return f"{suffix or 'no suffix'}: of {datatype}/ only {used} {'is' if datatype == 'dwi' else 'are'} used"
    if name.endswith(".nii") and f"{name}.gz" in images:
        return f"{name}.gz of the same name is used"
    dotted = [key for key, value in values.items() if "." in value]
    if dotted and datatype != "anat":
        return f"BIDS allows no dot in a label ({dotted[0]}-{values[dotted[0]]}); rename the file and those beside it"
    return ""


def _add_acquisition(members: dict[str, str], datatype: str, found: SubjectImages) -> None:
    """Add the magnitude of one acquisition, or its real part; the phase or imaginary part is kept beside it."""
    magnitude, phase = members.get("mag"), members.get("phase")
    cartesian = [members[part] for part in CARTESIAN if part in members]
    if len(cartesian) == 2 and not (magnitude and phase) and entities(cartesian[0])["suffix"] == "dwi":
        real, imaginary = cartesian
        found.by_kind["dwi"].append(real)
        found.phases[real] = imaginary
        found.unused.update({path: "the real and imaginary parts are used" for path in (magnitude, phase) if path})
        return
    for path in cartesian:
        beside = "magnitude and phase are used" if magnitude and phase else "the other part is missing"
        found.unused[path] = f"one part of a complex image; {beside}"
    if magnitude is not None:
        suffix = entities(magnitude)["suffix"]
        kind = suffix.lower() if datatype == "anat" else "reference" if (datatype, suffix) in REFERENCES else datatype
        found.by_kind[kind].append(magnitude)
        if phase is not None and datatype != "anat":
            found.phases[magnitude] = phase
    if phase is not None:
        beside = "the magnitude is used" if magnitude else "there is no magnitude (part-mag) beside it"
        found.unused[phase] = f"a phase image; {beside}"


def stem(name: str) -> str:
    """File name of an image without .nii.gz or .nii."""
    return name.removesuffix(".gz").removesuffix(".nii")
