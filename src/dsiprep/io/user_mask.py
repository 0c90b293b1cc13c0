"""`--anat-mask`: the brain mask that a user has for a subject's structural image."""

from __future__ import annotations

from pathlib import Path

from dsiprep.data.acquisition import Unit
from dsiprep.errors import InputError
from dsiprep.io.bids_filters import entities
from dsiprep.settings import AnatomySettings

__all__ = ["find_mask"]

ENDING = "_desc-brain_mask.nii.gz"


def find_mask(unit: Unit, settings: AnatomySettings) -> Path | None:
    """The file that `settings.mask` means for a unit, or None where it is empty.

    A pattern has {subject} in place of the label, and {session} where sessions have masks of their own. In a folder,
    the brain mask is looked for among the derivatives of the subject: one without `space` (the space of the
    structural image itself) that names no other modality, and, sessionwise, of the session.

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
        raise InputError(f"--anat-mask {settings.mask}: only {{subject}} and {{session}} may stand in braces") from None
    if path.is_dir():
        return _in_derivatives(path, unit, settings)
    if not path.is_file():
        raise InputError(f"--anat-mask: {path}: there is no such file; correct the path, or leave the option out")
    return path


def _in_derivatives(root: Path, unit: Unit, settings: AnatomySettings) -> Path:
    """The one brain mask in the structural image's own space."""
    found = sorted((root / f"sub-{unit.subject}").glob(f"**/anat/sub-{unit.subject}*{ENDING}"))
    own = [path for path in found if "space" not in entities(path)]
    if settings.reference == "sessionwise" and unit.session is not None:
        own = [path for path in own if entities(path).get("ses") in (unit.session, None)]
    if len(own) == 1:
        return own[0]
    shown = ", ".join(path.name for path in own or found) or "none"
    why = "no brain mask in the space of the structural image" if not own else "several brain masks"
    raise InputError(
        f"--anat-mask {root}: {why} of sub-{unit.subject} (found: {shown}); one anat/sub-{unit.subject}*{ENDING} "
        "without a space entity is wanted, or give the file itself or a pattern with {subject}"
    )
