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


def load_template(name: str = DEFAULT, allow_network: bool = False) -> Template:
    """A template at 1 mm: brain, mask and tissue priors.

    Parameters
    ----------
    name : str
        TemplateFlow's name. Where the default is not at hand, MNI152NLin2009aSym is given, under that name.
    allow_network : bool
        Let TemplateFlow download what is missing.

    Returns
    -------
    Template
        World coordinates are MNI: mm, RAS+, the anterior commissure near the origin.

    Raises
    ------
    InputError
        If a template other than the default is asked for and is not there, or a file of it is damaged.
    """
    if name == PACKAGED:
        return _packaged()
    files = _cached(name)
    if files is None and allow_network:
        _download(name)
        files = _cached(name)
    if files is not None:
        return _from_templateflow(name, files)
    if name != DEFAULT:
        raise InputError(
            f"template {name}: not in {_home()}; fetch it with `templateflow get {name}` or choose {DEFAULT}"
        )
    log.info("template %s is not in %s; taking %s, which comes with nilearn", name, _home(), PACKAGED)
    return _packaged()


def _home() -> Path:
    """TemplateFlow's folder, found as TemplateFlow does; importing TemplateFlow could create it and fetch."""
    named = os.environ.get("TEMPLATEFLOW_HOME")
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "templateflow"


def _cached(name: str) -> dict[str, Path] | None:
    """The files of a template at 1 mm, or None unless all are whole: TemplateFlow leaves empty stubs."""
    folder = _home() / f"tpl-{name}"
    endings = {"T1w": "T1w", "mask": "desc-brain_mask"} | {t: f"label-{t}_probseg" for t in TISSUES}
    found = {}
    for key, ending in endings.items():
        for resolution in ("01", "1"):
            file = folder / f"tpl-{name}_res-{resolution}_{ending}.nii.gz"
            if file.is_file() and file.stat().st_size > 0:
                found[key] = file
                break
    return found if len(found) == len(endings) else None


def _download(name: str) -> None:
    """Ask TemplateFlow for the files; a failure leaves things as they were and is logged."""
    os.environ.setdefault("TEMPLATEFLOW_HOME", str(_home()))
    try:
        from templateflow import api

        for query in ({"suffix": "T1w", "desc": None}, {"suffix": "mask", "desc": "brain"}):
            api.get(name, resolution=1, **query)
        for tissue in TISSUES:
            api.get(name, resolution=1, suffix="probseg", label=tissue)
    except Exception as error:  # whatever the network, the server or the template's name may do
        log.warning("TemplateFlow could not give %s: %s", name, error)


def _from_templateflow(name: str, files: dict[str, Path]) -> Template:
    head, mask = _read(files["T1w"]), _read(files["mask"])
    tissue = torch.stack([_read(files[t]).data for t in TISSUES])
    inside = (mask.data > 0.5).float()
    if not head.grid.matches(mask.grid):
        raise InputError(f"template {name}: T1w and mask in {files['mask'].parent} lie on different grids")
    return Template(name, Volume(head.data * inside, head.grid), Volume(inside, head.grid), tissue, "TemplateFlow")


def _packaged() -> Template:
    """ICBM152 2009a symmetric, the brain that nilearn brings: T1w, GM and WM as 0..255."""
    t1w, gm, wm = (_read(_nilearn_file(part)) for part in ("t1", "gm", "wm"))
    filled = ndimage.binary_fill_holes(t1w.numpy() > 0)
    mask = torch.from_numpy(np.asarray(filled, np.float32))
    gm_prior, wm_prior = gm.data / 255 * mask, wm.data / 255 * mask
    csf_prior = (mask - gm_prior - wm_prior).clamp(0, 1)
    tissue = torch.stack([csf_prior, gm_prior, wm_prior])
    return Template(PACKAGED, Volume(t1w.data * mask, t1w.grid), Volume(mask, t1w.grid), tissue, "nilearn")


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
