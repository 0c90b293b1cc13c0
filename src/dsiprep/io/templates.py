"""Load standard templates from the TemplateFlow folder, with the template bundled with nilearn as fallback."""

from __future__ import annotations

import logging
import os
import socket
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsiprep.data.grid import Grid, Volume
from dsiprep.data.template import Template
from dsiprep.errors import InputError
from dsiprep.io.bundled_template import (
    BUNDLED,
    DEFAULT,
    DISPLACEMENT,
    bundled_files,
    bundled_in_default_space,
    bundled_template,
)

__all__ = ["TemplateChoice", "choose_template", "load_template"]

log = logging.getLogger("dsiprep")
TISSUES = ("CSF", "GM", "WM")
SERVER = ("templateflow.s3.amazonaws.com", 443)
CONNECTION_SECONDS = 3.0


@dataclass(frozen=True)
class TemplateChoice:
    """Name of a template, a remark for the user, and the files that it is read from."""

    name: str
    note: str
    files: tuple[Path, ...]


def load_template(name: str = "", modality: str = "T1w", allow_network: bool = False) -> Template:
    """Load a template: brain, mask and tissue priors.

    Parameters
    ----------
    name : str
        TemplateFlow name, with the cohort after a plus sign for templates with cohorts ("MNIInfant+2"), or the path of
        a T1w or T2w file with mask and priors in the same folder. By default MNI152NLin2009cAsym; if TemplateFlow
        does not have it on this machine, the bundled MNI152NLin2009aSym warped to its space, with a note.
    modality : str
        "T2w" uses the T2w of a template that has one.
    allow_network : bool
        Let TemplateFlow download missing files if its server can be reached.

    Returns
    -------
    Template
        In the world coordinates of the template: mm, RAS+, with the anterior commissure near the origin.

    Raises
    ------
    InputError
        If the requested template is not available, or one of its files is missing or damaged.
    """
    if name == BUNDLED:
        return bundled_template()
    if _is_file(name):
        return _custom_template(Path(name))
    label, files = _find(name, modality, allow_network)
    if files is not None:
        return _read_template(label, files, "TemplateFlow")
    return replace(bundled_in_default_space(), note=_note_on_bundled())


def choose_template(name: str = "", modality: str = "T1w", allow_network: bool = False) -> TemplateChoice:
    """Name, note and files of the template that `load_template` returns; the bundled one is not read for it.

    Raises
    ------
    InputError
        As `load_template`.
    """
    if name == BUNDLED:
        return TemplateChoice(BUNDLED, "", bundled_files())
    if not _is_file(name) and _find(name, modality, allow_network)[1] is None:
        return TemplateChoice(DEFAULT, _note_on_bundled(), (*bundled_files(), DISPLACEMENT))
    found = load_template(name, modality)
    return TemplateChoice(found.name, found.note, found.files)


def _is_file(name: str) -> bool:
    return "/" in name or name.endswith((".nii", ".nii.gz"))


def _find(name: str, modality: str, allow_network: bool) -> tuple[str, dict[str, Path] | None]:
    """Label of a TemplateFlow template and its files; no files if the bundled one replaces the default."""
    space, _, cohort = (name or DEFAULT).replace(":cohort-", "+").partition("+")
    files = _local_files(space, cohort, modality)
    if files is None and allow_network:
        _download(space, cohort)
        files = _local_files(space, cohort, modality)
    if files is not None or (space == DEFAULT and not cohort):
        return f"{space}+{cohort}" if cohort else space, files
    raise InputError(
        f"template {name}: not in {_templateflow_home()} as T1w, brain mask and tissue priors at 1 mm, and not "
        f"downloaded; fetch it with `templateflow get {space}`, give the path of a T1w file with mask and priors in "
        f"the same folder, or omit --anatomical-template to use {DEFAULT}"
    )


def _note_on_bundled() -> str:
    return (
        f"{DEFAULT} is not in {_templateflow_home()}; {BUNDLED}, which nilearn ships, is used instead, warped to "
        f"the space of {DEFAULT}. For the original, run `templateflow get {DEFAULT}` where there is a network."
    )


def _templateflow_home() -> Path:
    """TemplateFlow's folder, by TemplateFlow's own rules; importing TemplateFlow could create and populate it."""
    configured = os.environ.get("TEMPLATEFLOW_HOME")
    if configured:
        return Path(configured)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "templateflow"


def _local_files(name: str, cohort: str, modality: str) -> dict[str, Path] | None:
    """The files of a template at 1 mm, or None unless all have content: TemplateFlow creates empty placeholders."""
    folder, stem = _templateflow_home() / f"tpl-{name}", f"tpl-{name}"
    if cohort:
        folder, stem = folder / f"cohort-{cohort}", f"{stem}_cohort-{cohort}"
    endings = {t: f"label-{t}_probseg" for t in TISSUES} | {"mask": "desc-brain_mask"}
    found = {key: _nonempty_file(folder, stem, ending) for key, ending in endings.items()}
    heads = [_nonempty_file(folder, stem, suffix) for suffix in dict.fromkeys((modality, "T1w", "T2w"))]
    found["head"] = next((head for head in heads if head is not None), None)
    files = {key: path for key, path in found.items() if path is not None}
    return files if len(files) == len(found) else None


def _nonempty_file(folder: Path, stem: str, ending: str) -> Path | None:
    """A file at 1 mm resolution that is not empty, or None."""
    for resolution in ("res-01_", "res-1_", ""):
        file = folder / f"{stem}_{resolution}{ending}.nii.gz"
        if file.is_file() and file.stat().st_size > 0:
            return file
    return None


def _download(name: str, cohort: str) -> None:
    """Download the files with TemplateFlow, if its server can be reached; failures are only logged."""
    if not _server_is_reachable():
        return
    os.environ.setdefault("TEMPLATEFLOW_HOME", str(_templateflow_home()))
    cohort_query: dict[str, Any] = {"cohort": cohort} if cohort else {}
    try:
        from templateflow import api

        for query in ({"suffix": ["T1w", "T2w"], "desc": None}, {"suffix": "mask", "desc": "brain"}):
            api.get(name, resolution=1, **query, **cohort_query)
        for tissue in TISSUES:
            api.get(name, resolution=1, suffix="probseg", label=tissue, **cohort_query)
    except Exception as error:  # errors of the network, the server or an unknown name
        log.warning("TemplateFlow could not provide %s: %s", name, error)


def _server_is_reachable() -> bool:
    """Whether TemplateFlow's server answers soon; without this check a firewall could stall the run for minutes."""
    if urllib.request.getproxies():
        return True  # a direct connection says nothing about the proxy
    try:
        socket.create_connection(SERVER, CONNECTION_SECONDS).close()
    except OSError:
        return False
    return True


def _custom_template(path: Path) -> Template:
    """Template from a user's file, with mask and priors in the same folder under TemplateFlow's names."""
    stem = path.name.removesuffix(".gz").removesuffix(".nii")
    head, _, suffix = stem.rpartition("_")
    if suffix not in ("T1w", "T2w") or not path.is_file():
        problem = "no such file" if not path.is_file() else "its name does not end in _T1w or _T2w"
        raise InputError(
            f"--anatomical-template {path}: {problem}; give a file such as tpl-Macaque_T1w.nii.gz or a TemplateFlow "
            "name, or omit the option"
        )
    head = head.removesuffix("_desc-brain")
    companions = {"mask": f"{head}_desc-brain_mask"} | {tissue: f"{head}_label-{tissue}_probseg" for tissue in TISSUES}
    files = {"head": path} | {
        key: file for key, name in companions.items() for file in (path.parent / f"{name}.nii.gz",) if file.is_file()
    }
    priors = [tissue for tissue in TISSUES if tissue in files]
    if "mask" not in files or len(priors) in (1, 2):
        missing = sorted(f"{name}.nii.gz" for key, name in companions.items() if key not in files)
        raise InputError(
            f"--anatomical-template {path}: {', '.join(missing)} missing in the same folder; the brain mask is "
            "required, and either all three tissue priors or none"
        )
    label = "".join(part for part in head.removeprefix("tpl-").split("_")[0] if part.isalnum() or part == "+")
    if not label or label in (DEFAULT, BUNDLED):
        raise InputError(
            f"--anatomical-template {path}: {label or head!r} is not a valid name for a custom template; rename the "
            "files, for example to tpl-MyTemplate_T1w.nii.gz"
        )
    return _read_template(label, files, str(path.parent))


def _read_template(name: str, files: dict[str, Path], origin: str) -> Template:
    head, mask = _read(files["head"]), _read(files["mask"])
    inside = (mask.data > 0.5).float()
    parts = [_read(files[tissue]) for tissue in TISSUES if tissue in files]
    for part in (mask, *parts):
        if not head.grid.matches(part.grid):
            raise InputError(f"template {name}: the images in {files['mask'].parent} have different grids")
    if not float(inside.sum()):
        raise InputError(f"template {name}: {files['mask']} is empty; the mask must exceed 0.5 in the brain")
    tissue = torch.stack([part.data for part in parts]) if parts else None
    brain = Volume(head.data * inside, head.grid)
    return Template(name, brain, Volume(inside, head.grid), tissue, origin, tuple(files.values()))


def _read(path: Path) -> Volume:
    import nibabel as nib

    try:
        image: Any = nib.load(path)
        data = np.asarray(image.dataobj, dtype=np.float32)
    except (OSError, EOFError, nib.filebasedimages.ImageFileError) as error:
        raise InputError(f"{path}: truncated or damaged ({error}); delete it so that it is downloaded again") from error
    i, j, k = data.shape[:3]
    return Volume(torch.from_numpy(data.reshape(i, j, k)), Grid((i, j, k), np.asarray(image.affine, float)))
