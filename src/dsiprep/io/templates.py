"""Standard templates: from TemplateFlow's folder where they are there, otherwise the one that nilearn ships.

Nothing is fetched unless it is asked for, so a machine without a network gives the same results every time.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from dsiprep.data.grid import Grid, Volume
from dsiprep.data.template import Template
from dsiprep.errors import InputError

__all__ = ["load_template"]

log = logging.getLogger("dsiprep")
DEFAULT = "MNI152NLin2009cAsym"
PACKAGED = "MNI152NLin2009aSym"
TISSUES = ("CSF", "GM", "WM")


def load_template(wanted: str = "", modality: str = "T1w", allow_network: bool = False) -> Template:
    """A template: brain, mask and tissue priors.

    Parameters
    ----------
    wanted : str
        TemplateFlow's name, with the cohort after a plus sign where there are cohorts ("MNIInfant+2"), or the path of
        a T1w or T2w file that has mask and priors beside it. By default MNI152NLin2009cAsym, or, where that is not at
        hand, MNI152NLin2009aSym under its own name and with a note.
    modality : str
        "T2w" takes the T2w of a template that has one.
    allow_network : bool
        Let TemplateFlow download what is missing.

    Returns
    -------
    Template
        World coordinates are the template's: mm, RAS+, the anterior commissure near the origin.

    Raises
    ------
    InputError
        If the template asked for is not there, or a file of it is missing or damaged.
    """
    if wanted == PACKAGED:
        return _packaged("")
    if "/" in wanted or wanted.endswith((".nii", ".nii.gz")):
        return _own(Path(wanted))
    name, _, cohort = (wanted or DEFAULT).replace(":cohort-", "+").partition("+")
    files = _cached(name, cohort, modality)
    if files is None and allow_network:
        _download(name, cohort)
        files = _cached(name, cohort, modality)
    if files is not None:
        return _read_template(f"{name}+{cohort}" if cohort else name, files, "TemplateFlow")
    if wanted:
        raise InputError(
            f"template {wanted}: not in {_home()} as T1w, brain mask and tissue priors at 1 mm, and it could not be "
            f"fetched; fetch it with `templateflow get {name}`, give the path of a T1w file with mask and priors "
            f"beside it, or leave --anatomical-template out to take {DEFAULT} or {PACKAGED}"
        )
    note = f"{DEFAULT} is not in {_home()}: {PACKAGED}, which comes with nilearn, was taken as template instead."
    return _packaged(note)


def _home() -> Path:
    """TemplateFlow's folder, found as TemplateFlow does; importing TemplateFlow could create it and fetch."""
    named = os.environ.get("TEMPLATEFLOW_HOME")
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "templateflow"


def _cached(name: str, cohort: str, modality: str) -> dict[str, Path] | None:
    """The files of a template at 1 mm, or None unless all are whole: TemplateFlow leaves empty stubs."""
    folder, stem = _home() / f"tpl-{name}", f"tpl-{name}"
    if cohort:
        folder, stem = folder / f"cohort-{cohort}", f"{stem}_cohort-{cohort}"
    endings = {t: f"label-{t}_probseg" for t in TISSUES} | {"mask": "desc-brain_mask"}
    found = {key: _whole(folder, stem, ending) for key, ending in endings.items()}
    heads = [_whole(folder, stem, kind) for kind in dict.fromkeys((modality, "T1w", "T2w"))]
    found["head"] = next((head for head in heads if head is not None), None)
    files = {key: path for key, path in found.items() if path is not None}
    return files if len(files) == len(found) else None


def _whole(folder: Path, stem: str, ending: str) -> Path | None:
    """A file at 1 mm that is not empty."""
    for resolution in ("res-01_", "res-1_", ""):
        file = folder / f"{stem}_{resolution}{ending}.nii.gz"
        if file.is_file() and file.stat().st_size > 0:
            return file
    return None


def _download(name: str, cohort: str) -> None:
    """Ask TemplateFlow for the files; a failure leaves things as they were and is logged."""
    os.environ.setdefault("TEMPLATEFLOW_HOME", str(_home()))
    of: dict[str, Any] = {"cohort": cohort} if cohort else {}
    try:
        from templateflow import api

        for query in ({"suffix": ["T1w", "T2w"], "desc": None}, {"suffix": "mask", "desc": "brain"}):
            api.get(name, resolution=1, **query, **of)
        for tissue in TISSUES:
            api.get(name, resolution=1, suffix="probseg", label=tissue, **of)
    except Exception as error:  # whatever the network, the server or the template's name may do
        log.warning("TemplateFlow could not give %s: %s", name, error)


def _own(path: Path) -> Template:
    """A file of one's own, mask and priors beside it, named as TemplateFlow names them."""
    stem = path.name.removesuffix(".gz").removesuffix(".nii")
    head, _, suffix = stem.rpartition("_")
    if suffix not in ("T1w", "T2w") or not path.is_file():
        why = "no such file" if not path.is_file() else "not a T1w or T2w by its name"
        raise InputError(
            f"--anatomical-template {path}: {why}; give a file such as tpl-Macaque_T1w.nii.gz, a name of "
            "TemplateFlow, or leave the option out"
        )
    head = head.removesuffix("_desc-brain")
    beside = {"mask": f"{head}_desc-brain_mask"} | {tissue: f"{head}_label-{tissue}_probseg" for tissue in TISSUES}
    files = {"head": path} | {
        key: file for key, name in beside.items() for file in (path.parent / f"{name}.nii.gz",) if file.is_file()
    }
    priors = [tissue for tissue in TISSUES if tissue in files]
    if "mask" not in files or len(priors) in (1, 2):
        lacking = sorted(f"{beside[key]}.nii.gz" for key in beside if key not in files)
        raise InputError(
            f"--anatomical-template {path}: {', '.join(lacking)} missing beside it; the brain mask is needed, and of "
            "the tissue priors all three or none"
        )
    label = "".join(part for part in head.removeprefix("tpl-").split("_")[0] if part.isalnum() or part == "+")
    if not label or label in (DEFAULT, PACKAGED):
        raise InputError(
            f"--anatomical-template {path}: {label or head!r} cannot be the name of a template of your own; rename the "
            "files, such as tpl-MyTemplate_T1w.nii.gz"
        )
    return _read_template(label, files, str(path.parent))


def _read_template(name: str, files: dict[str, Path], origin: str) -> Template:
    head, mask = _read(files["head"]), _read(files["mask"])
    inside = (mask.data > 0.5).float()
    parts = [_read(files[tissue]) for tissue in TISSUES if tissue in files]
    for part in (mask, *parts):
        if not head.grid.matches(part.grid):
            raise InputError(f"template {name}: the images in {files['mask'].parent} lie on different grids")
    if not float(inside.sum()):
        raise InputError(f"template {name}: {files['mask']} is empty; the mask has to be above 0.5 in the brain")
    tissue = torch.stack([part.data for part in parts]) if parts else None
    brain = Volume(head.data * inside, head.grid)
    return Template(name, brain, Volume(inside, head.grid), tissue, origin, tuple(files.values()))


def _packaged(note: str) -> Template:
    """ICBM152 2009a symmetric, the brain that nilearn brings: T1w, GM and WM as 0..255."""
    files = tuple(_nilearn_file(part) for part in ("t1", "gm", "wm"))
    t1w, gm, wm = (_read(file) for file in files)
    filled = ndimage.binary_fill_holes(t1w.numpy() > 0)
    mask = torch.from_numpy(np.asarray(filled, np.float32))
    gm_prior, wm_prior = gm.data / 255 * mask, wm.data / 255 * mask
    csf_prior = (mask - gm_prior - wm_prior).clamp(0, 1)
    tissue = torch.stack([csf_prior, gm_prior, wm_prior])
    return Template(PACKAGED, Volume(t1w.data * mask, t1w.grid), Volume(mask, t1w.grid), tissue, "nilearn", files, note)


def _nilearn_file(part: str) -> Path:
    """Path of a packaged file; the package is located, not imported, which would take seconds."""
    spec = importlib.util.find_spec("nilearn")
    file = f"mni_icbm152_{part}_tal_nlin_sym_09a_converted.nii.gz"
    if spec is None or spec.origin is None:
        raise InputError("no template: nilearn, which ships one, is not installed; run `pip install nilearn`")
    path = Path(spec.origin).parent / "datasets" / "data" / file
    if not path.is_file():
        raise InputError(f"no template: {path} is missing; reinstall nilearn, or set TEMPLATEFLOW_HOME")
    return path


def _read(path: Path) -> Volume:
    import nibabel as nib

    try:
        image: Any = nib.load(path)
        data = np.asarray(image.dataobj, dtype=np.float32)
    except (OSError, EOFError, nib.filebasedimages.ImageFileError) as error:
        raise InputError(f"{path}: not a whole image ({error}); delete it so that it is fetched anew") from error
    i, j, k = data.shape[:3]
    return Volume(torch.from_numpy(data.reshape(i, j, k)), Grid((i, j, k), np.asarray(image.affine, float)))
