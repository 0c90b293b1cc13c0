"""A series on a lattice beside the preprocessed one, and the table of gradients that a user may give."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from bids.layout import BIDSLayout
from dipy.io.gradients import read_bvals_bvecs

from dsiprep.errors import GradientError
from dsiprep.io import derivatives
from dsiprep.io.q_grid_table import read_q_grid
from dsiprep.stages.lattice import evaluate_lattice
from helpers.report_subject import make_subject

STEM = "sub-01_acq-dsi_space-ACPC_desc-lattice"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out, subject = tmp_path_factory.mktemp("derivatives"), make_subject()
    lattice = evaluate_lattice(subject.preprocessed, subject.acquired, "acquired")
    derivatives.write_root(out, "0.0")
    derivatives.write_unit(replace(subject, lattice=lattice), out, None)
    return out


def test_qsirecon_finds_the_preprocessed_series_alone(written: Path) -> None:
    """Its query for series: any image of suffix dwi in ACPC space, whatever its `desc`."""
    layout = BIDSLayout(written, validate=False, is_derivative=True)
    found = layout.get(suffix="dwi", space=["T1w", "ACPC"], extension=["nii", "nii.gz"])
    assert [file.entities["desc"] for file in found] == ["preproc"]
    assert [Path(file.path).name for file in layout.get(suffix="dwimap", desc="lattice", extension=".nii.gz")] == [
        f"{STEM}_dwimap.nii.gz"
    ]


def test_tables_are_on_the_lattice_along_the_image_axes(written: Path) -> None:
    folder = next(written.rglob("dwi"))
    bvals, bvecs = read_bvals_bvecs(str(folder / f"{STEM}_dwimap.bval"), str(folder / f"{STEM}_dwimap.bvec"))
    content = json.loads((folder / f"{STEM}_dwimap.json").read_text())
    q = np.sqrt(bvals / bvals[1])[:, None] * bvecs
    np.testing.assert_allclose(q, np.array(content["LatticePoints"]) * [-1, -1, 1], atol=1e-3)
    assert nib.load(folder / f"{STEM}_dwimap.nii.gz").shape[3] == len(bvals)
    assert np.loadtxt(folder / f"{STEM}_fslbvecs.txt").shape == (3, len(bvals))
    assert set(content["GradientTables"]) == {
        f"{STEM}_dwimap.bvec", f"{STEM}_dwimap.b", f"{STEM}_dwimap.b_table.txt", f"{STEM}_fslbvecs.txt"
    }  # fmt: skip
    assert len(content["Uncertainty"]) == len(bvals)
    assert content["LeftOutError"] > 0


def test_source_is_the_preprocessed_series(written: Path) -> None:
    folder = next(written.rglob("dwi"))
    (source,) = json.loads((folder / f"{STEM}_dwimap.json").read_text())["Sources"]
    assert (written / source.removeprefix("bids::")).is_file()


def test_a_later_run_without_a_lattice_removes_it(tmp_path: Path) -> None:
    subject = make_subject()
    lattice = evaluate_lattice(subject.preprocessed, subject.acquired, "acquired")
    for each in (lattice, None):
        derivatives.write_unit(replace(subject, lattice=each), tmp_path, None)
    assert not list(tmp_path.rglob("*lattice*"))


def test_table_of_a_user_is_read(tmp_path: Path) -> None:
    path = tmp_path / "table.b"
    path.write_text("0 0 0 0\n1 0 0 1000\n0.6 0.8 0 2000\n")
    table = read_q_grid(str(path))
    assert table is not None
    np.testing.assert_array_equal(table[0], [0, 1000, 2000])
    np.testing.assert_allclose(table[1], [[0, 0, 0], [1, 0, 0], [0.6, 0.8, 0]])
    assert read_q_grid("dsi515") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1 0 0\n", "3 columns"),
        ("2 0 0 1000\n", "unit length"),
        ("1 0 0 -5\n", "negative"),
        ("nan 0 0 1000\n", "not finite"),
    ],
)
def test_other_tables_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "table.b"
    path.write_text(content)
    with pytest.raises(GradientError, match=message):
        read_q_grid(str(path))


def test_a_name_that_is_no_file_is_refused() -> None:
    with pytest.raises(GradientError, match="neither a file nor one of"):
        read_q_grid("dsi123")
