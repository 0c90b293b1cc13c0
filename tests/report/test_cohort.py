"""Cohorts: tables, robust distances, ratings that are read back, and outputs of QSIPrep."""

from __future__ import annotations

import csv
import json
import tomllib
from pathlib import Path

import numpy as np
import pytest

from dsiprep.data.results import UnitResults
from dsiprep.errors import InputError
from dsiprep.report.cohort import read_cohort, robust_z
from dsiprep.report.group_page import write_group
from dsiprep.report.html import render_report
from dsiprep.report.verdict_bounds import read_bounds
from helpers.cohorts import make_cohort


@pytest.fixture(scope="module")
def record(subject: UnitResults, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON file of a series, as its report writes it."""
    out = tmp_path_factory.mktemp("one")
    render_report([subject], out, "1.2.3")
    return out / "sub-01" / "figures" / "sub-01_acq-dsi_desc-quality_dwi.json"


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def test_the_record_of_a_series_holds_metrics_verdicts_and_their_meaning(record: Path) -> None:
    content = json.loads(record.read_text())
    assert content["bids_meta"] == {"sub": "01"}
    assert content["mean_fd"] == pytest.approx(content["check_mean_fd"], rel=1e-6)
    numbers = [name for name, value in content.items() if isinstance(value, int | float)]
    assert all(content["descriptions"][name] for name in numbers)
    assert all(verdict["reason"] and verdict["source"] for verdict in content["verdicts"])


def test_robust_distances_agree_with_scipy() -> None:
    from scipy.stats import median_abs_deviation

    values = np.random.default_rng(0).normal(5, 2, 501)
    expected = (values - np.median(values)) / median_abs_deviation(values, scale="normal")
    assert robust_z(values, values) == pytest.approx(expected, rel=1e-4)


def test_distances_without_a_scale() -> None:
    same = np.full(5, 2.0)
    assert robust_z(same, same).tolist() == [0.0] * 5
    assert np.isnan(robust_z(np.array([3.0]), same)).all()
    mostly_same = np.array([2.0, 2, 2, 2, 4])
    assert np.isfinite(robust_z(mostly_same, mostly_same)).all()
    assert np.isnan(robust_z(same, np.array([np.nan]))).all()


def test_the_outlier_comes_first_and_the_tables_name_it(record: Path, tmp_path: Path) -> None:
    make_cohort(tmp_path, record, 40, faults={"sub-0007": {"mean_fd": 9.0}})
    page = write_group(tmp_path, "1.2.3")
    rows = rows_of(tmp_path / "group_dwi.tsv")
    assert len(rows) == 40
    worst = max(rows, key=lambda row: float(row["worst_z"]))
    assert (worst["subject"], worst["worst_metric"]) == ("sub-0007", "mean_fd")
    assert set(json.loads((tmp_path / "group_dwi.json").read_text())) == set(rows[0])
    text = page.read_text(encoding="utf-8")
    assert text.index('href="sub-0007.html"') < text.index('href="sub-0001.html"')


def test_good_extremes_are_not_put_first(record: Path, tmp_path: Path) -> None:
    make_cohort(tmp_path, record, 30, faults={"sub-0003": {"check_snr": 9000.0}})
    write_group(tmp_path, "1")
    row = next(row for row in rows_of(tmp_path / "group_dwi.tsv") if row["subject"] == "sub-0003")
    assert row["worst_metric"] != "check_snr"


def test_a_reference_table_takes_the_place_of_the_cohort(record: Path, tmp_path: Path) -> None:
    make_cohort(tmp_path / "ours", record, 12)
    make_cohort(tmp_path / "theirs", record, 12, scale={"mean_fd": 0.2})
    write_group(tmp_path / "theirs", "1")
    write_group(tmp_path / "ours", "1", reference=tmp_path / "theirs" / "group_dwi.tsv")
    assert all(row["worst_metric"] == "mean_fd" for row in rows_of(tmp_path / "ours" / "group_dwi.tsv"))


def test_bounds_from_a_cohort_can_be_given_to_a_report(record: Path, tmp_path: Path) -> None:
    make_cohort(tmp_path, record, 25)
    write_group(tmp_path, "1")
    written = tomllib.loads((tmp_path / "group_bounds.toml").read_text())
    bounds = read_bounds(tmp_path / "group_bounds.toml")
    assert bounds["mean_fd"].look == written["mean_fd"]["look"]
    assert "cohort of 25 series" in bounds["mean_fd"].source
    assert written["snr"]["bad"] < written["snr"]["look"]
    assert written["mean_fd"]["bad"] > written["mean_fd"]["look"]


def test_ratings_are_read_back(record: Path, tmp_path: Path) -> None:
    make_cohort(tmp_path, record, 5)
    (tmp_path / "group_ratings.csv").write_text(
        'series,rating,note\nsub-0002_acq-dsi,exclude,"moved, a lot"\nsub-0003_acq-dsi,perhaps,\n'
    )
    page = write_group(tmp_path, "1").read_text(encoding="utf-8")
    rows = {row["series"]: row["rating"] for row in rows_of(tmp_path / "group_dwi.tsv")}
    assert rows["sub-0002_acq-dsi"] == "exclude"
    assert rows["sub-0003_acq-dsi"] == "n/a"
    assert "moved, a lot" in page


def test_series_of_qsiprep_are_read_from_their_tables(record: Path, tmp_path: Path) -> None:
    make_cohort(tmp_path, record, 3)
    folder = tmp_path / "sub-q1" / "ses-a" / "dwi"
    folder.mkdir(parents=True)
    table = folder / "sub-q1_ses-a_space-ACPC_desc-image_qc.tsv"
    table.write_text("file_name\tsubject_id\traw_neighbor_corr\tmean_fd\tmax_fd\nx\tq1\t0.7\t0.4\tnan\n")
    series = {one.name: one for one in read_cohort(tmp_path)}
    assert series["sub-q1_ses-a"].metrics == {"raw_neighbor_corr": 0.7, "mean_fd": 0.4}
    write_group(tmp_path, "1")


def test_a_folder_without_series_and_a_damaged_file_are_refused(record: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run the participant level first"):
        write_group(tmp_path, "1")
    make_cohort(tmp_path, record, 2)
    next(tmp_path.glob("sub-0001/figures/*.json")).write_text("{")
    with pytest.raises(InputError, match="not a quality file of dsiprep"):
        write_group(tmp_path, "1")


def test_one_series_alone_has_a_page(record: Path, tmp_path: Path) -> None:
    make_cohort(tmp_path, record, 1)
    assert "1 series of 1 subjects" in write_group(tmp_path, "1").read_text(encoding="utf-8")
    assert not (tmp_path / "group_bounds.toml").exists()
