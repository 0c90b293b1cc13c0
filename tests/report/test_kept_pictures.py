"""Figures compared with kept ones. After a change that is meant: `python tests/report/test_kept_pictures.py` in tests/.

Kept pictures are 160 pixels wide, so that fonts and libraries may differ and contents may not.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsiprep.data.results import UnitResults
from dsiprep.report.html import render_report

KEPT = Path(__file__).parent / "kept_pictures"
NAMES = ("anat", "colorFA", "contrast", "coregDwiref", "denoiseAfter", "displacement", "fieldmap", "hmcUpAfter",
         "means", "odf", "sdcDifferenceBefore", "sticks", "templateSubject")  # fmt: skip
WIDTH = 160
MEAN_DIFFERENCE, SHARE_OF_OUTLIERS = 3.0, 0.02  # grey levels; pixels that differ by more than 40 of them


def shrunk(path: Path) -> np.ndarray:
    """A figure as RGB, `WIDTH` pixels wide."""
    with Image.open(path) as picture:
        rgb = picture.convert("RGB")
    return np.asarray(rgb.resize((WIDTH, round(rgb.height * WIDTH / rgb.width)), Image.Resampling.BOX))


def figure(folder: Path, name: str) -> Path:
    return next((folder / "sub-01" / "figures").glob(f"*_desc-{name}_dwi.*"))


@pytest.fixture(scope="module")
def folder(subject: UnitResults, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("derivatives")
    render_report([subject], out, "1")
    return out


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_looks_like_the_kept_one(folder: Path, name: str) -> None:
    now = shrunk(figure(folder, name)).astype(float)
    kept = np.asarray(Image.open(KEPT / f"{name}.png").convert("RGB")).astype(float)
    assert now.shape == kept.shape
    difference = np.abs(now - kept)
    assert difference.mean() < MEAN_DIFFERENCE
    assert (difference.max(-1) > 40).mean() < SHARE_OF_OUTLIERS


def test_a_changed_figure_would_be_seen(folder: Path) -> None:
    """Mirrored, the coronal row of the sticks differs by far more than the tolerance."""
    picture = shrunk(figure(folder, "sticks")).astype(float)
    assert np.abs(picture - picture[:, ::-1]).mean() > MEAN_DIFFERENCE


if __name__ == "__main__":
    import tempfile

    from helpers.report_subject import make_subject

    KEPT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        render_report([make_subject()], Path(made), "1")
        for kept_name in NAMES:
            Image.fromarray(shrunk(figure(Path(made), kept_name))).save(KEPT / f"{kept_name}.png", optimize=True)
