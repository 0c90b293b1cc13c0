"""Find the user-supplied brain mask of a structural image (`--anat-mask`)."""

from __future__ import annotations

from pathlib import Path

from dsiprep.data.acquisition import Unit
from dsiprep.errors import InputError
from dsiprep.io.bids_filters import entities
from dsiprep.settings import AnatomySettings

__all__ = ["find_mask"]

ENDING = "_desc-brain_mask.nii.gz"


def find_mask(unit: Unit, settings: AnatomySettings) -> Path | None:
    """The brain mask that `settings.mask` specifies for a unit, or None if the setting is empty.

    `settings.mask` is a file, a pattern with {subject} and optionally {session} for the labels, or a folder of
    derivatives. In a folder, the mask must have no `space` entity (the space of the structural image) and, sessionwise,
    belong to the session of the unit or to none.

    Raises
    ------
    InputError
        If there is no such file, or there are several.
    """
    if not settings.mask:
        return None
    names = {"subject": unit.subject, "session": unit.session or ""}
    try:
        path = Path(settings.mask.format(**names))
    except (KeyError, IndexError, ValueError):
        raise InputError(f"--anat-mask {settings.mask}: braces may only contain subject or session") from None
    if path.is_dir():
        return _in_derivatives(path, unit, settings)
    if not path.is_file():
        raise InputError(f"--anat-mask: {path}: there is no such file; correct the path, or omit the option")
    return path


def _in_derivatives(root: Path, unit: Unit, settings: AnatomySettings) -> Path:
    """The single brain mask in the space of the structural image."""
    found = sorted((root / f"sub-{unit.subject}").glob(f"**/anat/sub-{unit.subject}*{ENDING}"))
    native = [path for path in found if "space" not in entities(path)]
    if settings.reference == "sessionwise" and unit.session is not None:
        native = [path for path in native if entities(path).get("ses") in (unit.session, None)]
    if len(native) == 1:
        return native[0]
    shown = ", ".join(path.name for path in native or found) or "none"
    problem = "no brain mask in the space of the structural image" if not native else "several brain masks"
    raise InputError(
        f"--anat-mask {root}: {problem} for sub-{unit.subject} (found: {shown}); expected exactly one "
        f"anat/sub-{unit.subject}*{ENDING} without a space entity; alternatively, give the file or a pattern with "
        "{subject}"
    )
