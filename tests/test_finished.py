"""Records of finished subjects: what leaves them valid, and what does not."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dsiprep import finished
from dsiprep.data.acquisition import PhaseEncoding, Run, Unit
from dsiprep.finished import FinishedSubjects
from dsiprep.settings import AnatomySettings, ResampleSettings, Settings

SETTINGS = Settings(resample=ResampleSettings(resolution=2.0))
WARNINGS = {"sub-01_dir-AP": ("an image is missing",)}


@pytest.fixture
def unit(tmp_path: Path) -> Unit:
    image, bval, bvec = (tmp_path / f"sub-01_dwi{suffix}" for suffix in (".nii.gz", ".bval", ".bvec"))
    for path in (image, bval, bvec):
        path.write_text(path.name)
    run = Run(image, bval, bvec, PhaseEncoding(1, -1, 0.05), {"EchoTime": 0.09})
    return Unit("01", None, "sub-01_dir-AP", (run,))


def finish(folder: Path, unit: Unit) -> None:
    records = FinishedSubjects(folder, SETTINGS)
    records.remember("01", (unit,), records.begin("01", (unit,)), WARNINGS)


@pytest.fixture
def out(tmp_path: Path, unit: Unit) -> Path:
    """Outputs of a finished subject."""
    folder = tmp_path / "out"
    (folder / "sub-01" / "dwi").mkdir(parents=True)
    (folder / "sub-01" / "dwi" / "sub-01_dwi.nii.gz").write_text("image")
    (folder / "sub-01.html").write_text("report")
    finish(folder, unit)
    return folder


def known(out: Path, unit: Unit, settings: Settings = SETTINGS) -> bool:
    found = FinishedSubjects(out, settings).warnings_of("01", (unit,))
    assert found in (None, WARNINGS)
    return found is not None


def test_unchanged_subject_is_known(out: Path, unit: Unit) -> None:
    assert known(out, unit)
    image = unit.runs[0].image
    os.utime(image, ns=(0, 0))  # copied without its times
    assert known(out, unit)


CHANGES: dict[str, Callable[[Path, Unit], object]] = {
    "series": lambda out, unit: unit.runs[0].image.write_text("sub-01_dwi.nii.GZ"),
    "b-table": lambda out, unit: unit.runs[0].bvec.write_text("1 0 0"),
    "series removed": lambda out, unit: unit.runs[0].image.unlink(),
    "output changed": lambda out, unit: (out / "sub-01" / "dwi" / "sub-01_dwi.nii.gz").write_text("other image"),
    "output removed": lambda out, unit: (out / "sub-01.html").unlink(),
    "output added": lambda out, unit: (out / "sub-01" / "dwi" / "new").touch(),
    "record damaged": lambda out, unit: (out / "logs" / "sub-01_finished.json").write_text("{"),
    "record of another form": lambda out, unit: (out / "logs" / "sub-01_finished.json").write_text("[]"),
    "processed again": lambda out, unit: FinishedSubjects(out, SETTINGS).begin("01", (unit,)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_change_of_a_file_is_seen(out: Path, unit: Unit, change: Callable[[Path, Unit], object]) -> None:
    change(out, unit)
    assert not known(out, unit)


def test_input_that_changed_during_the_run_is_seen(out: Path, unit: Unit) -> None:
    records = FinishedSubjects(out, SETTINGS)
    inputs = records.begin("01", (unit,))
    unit.runs[0].bvec.write_text("1 0 0")
    records.remember("01", (unit,), inputs, WARNINGS)
    assert not known(out, unit)


def test_change_of_settings_metadata_or_images_is_seen(out: Path, unit: Unit, tmp_path: Path) -> None:
    assert not known(out, unit, replace(SETTINGS, anatomy=AnatomySettings(normalize=False)))
    assert not known(out, replace(unit, runs=(replace(unit.runs[0], metadata={"EchoTime": 0.1}),)))
    (tmp_path / "T1w.nii.gz").touch()
    assert not known(out, replace(unit, t1w=(tmp_path / "T1w.nii.gz",)))
    assert known(out, unit)


def test_change_of_the_code_is_seen(out: Path, unit: Unit, monkeypatch: pytest.MonkeyPatch) -> None:
    finished._common.cache_clear()
    monkeypatch.setattr(finished, "package_digest", lambda: "other")
    assert not known(out, unit)
    finished._common.cache_clear()
    monkeypatch.undo()
    assert known(out, unit)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_not_a_file_is_not_read(tmp_path: Path, unit: Unit, kind: str) -> None:
    """A pipe without a writer waits for ever, and a device never ends."""
    unit.runs[0].bval.unlink()
    if kind == "pipe":
        os.mkfifo(unit.runs[0].bval)
    else:
        unit.runs[0].bval.symlink_to("/dev/zero")
    assert FinishedSubjects(tmp_path / "out", SETTINGS).begin("01", (unit,)) == {}
