"""`dsiprep BIDS OUT group`: what it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsiprep.cli.app import main


def write_series(out: Path, subject: str, mean_fd: float) -> None:
    folder = out / subject / "figures"
    folder.mkdir(parents=True)
    record = {"mean_fd": mean_fd, "verdicts": [], "descriptions": {"mean_fd": "Mean framewise displacement (mm)"}}
    (folder / f"{subject}_desc-quality_dwi.json").write_text(json.dumps(record))


def test_the_group_level_needs_no_resolution(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, mean_fd in enumerate((0.2, 0.3, 0.25, 4.0)):
        write_series(tmp_path, f"sub-{number}", mean_fd)
    assert main(["/bids", str(tmp_path), "group"]) == 0
    assert "group.html" in capsys.readouterr().out
    assert (tmp_path / "group_dwi.tsv").read_text().splitlines()[4].startswith("sub-3\tsub-3\t0\t0\t")


def test_a_folder_that_is_missing_or_empty_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["/bids", str(tmp_path / "none"), "group"]) == 1
    assert "run the participant level first" in capsys.readouterr().err
    assert main(["/bids", str(tmp_path), "group"]) == 1
    assert "there are no series with quality metrics" in capsys.readouterr().err


def test_a_reference_table_without_numbers_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_series(tmp_path, "sub-1", 0.2)
    table = tmp_path / "table.tsv"
    table.write_text("series\tnote\nsub-1\tfine\n")
    assert main(["/bids", str(tmp_path), "group", "--reference-table", str(table)]) == 1
    assert "no column holds numbers" in capsys.readouterr().err


def test_wrong_bounds_are_refused_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bounds = tmp_path / "bounds.toml"
    bounds.write_text("[motion]\nlook = 1\n")
    words = [str(tmp_path), str(tmp_path / "out"), "participant", "--output-resolution", "2"]
    assert main([*words, "--report-bounds", str(bounds)]) == 2
    assert "unknown check motion" in capsys.readouterr().err
