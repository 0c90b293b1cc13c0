"""ODF glyphs: the transform agrees with DIPY's, and outlines point where fibres do."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dsiprep.data.results import UnitResults
from dsiprep.report import fibre_glyphs
from dsiprep.report.fibre_glyphs import SECTORS, gqi_matrix, odf_figure, sphere
from helpers.report_subject import lattice


def test_the_odf_agrees_with_dipy() -> None:
    dipy_gqi = pytest.importorskip("dipy.reconst.gqi")
    from dipy.core.gradients import gradient_table
    from dipy.core.sphere import Sphere

    bvals, bvecs = lattice(3, 6000.0)
    signal = np.exp(-bvals * (2e-4 + 1.5e-3 * (bvecs @ [0.6, 0.0, 0.8]) ** 2))
    directions = sphere(200)
    model = dipy_gqi.GeneralizedQSamplingModel(
        gradient_table(bvals, bvecs=bvecs), method="standard", sampling_length=1.25
    )
    expected = model.fit(signal).odf(Sphere(xyz=directions))
    ours = gqi_matrix(bvals, bvecs, directions) @ signal
    # DIPY uses 0.01506 mm²/s for 6 D, which is 6 x 0.0025 within half a percent.
    assert np.corrcoef(ours, expected)[0, 1] > 0.9999
    assert ours == pytest.approx(expected, rel=0.02, abs=0.02 * np.abs(expected).max())


def test_directions_cover_the_sphere_evenly() -> None:
    directions = sphere(720)
    assert np.linalg.norm(directions, axis=1) == pytest.approx(np.ones(720))
    nearest = np.sort(directions @ directions.T, axis=1)[:, -2]
    assert np.degrees(np.arccos(nearest)).max() < 9


def test_a_crossing_has_two_lobes_in_the_plane() -> None:
    bvals, bvecs = lattice(4, 9000.0)
    fibres = np.array([[1.0, 0, 0], [0, 0, 1.0]])
    signal = sum(np.exp(-bvals * (2e-4 + 1.5e-3 * (bvecs @ fibre) ** 2)) for fibre in fibres)
    directions = sphere(720)
    odf = (gqi_matrix(bvals, bvecs, directions) @ signal)[None].astype(np.float32)
    extent, reached = fibre_glyphs._outlines(odf, directions, "coronal")
    quarter = SECTORS // 4
    for sector in (0, quarter, 2 * quarter, 3 * quarter):
        assert extent[0, sector] > 0.85
        assert np.abs(directions[reached[0, sector]] @ fibres.T).max() > 0.97
    assert extent[0, quarter // 2] < 0.6


def test_the_figure_is_larger_than_the_page_and_needs_directions(subject: UnitResults) -> None:
    content = odf_figure(subject.preprocessed)
    assert content is not None
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.width > 900
        assert np.ptp(np.asarray(picture)) > 100
    few = subject.preprocessed.dwi.select(np.arange(len(subject.preprocessed.dwi)) < 10)
    assert odf_figure(replace(subject.preprocessed, dwi=few)) is None
