"""`--dry-run` refuses what the run would refuse, and says what will not be done; `--json` and `--validate`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from dsiprep.cli import app as cli
from dsiprep.cli import plan_page
from dsiprep.costs import BASE_MB
from dsiprep.errors import InputError, MetadataError, SettingsError
from dsiprep.io.unit_check import check_unit
from dsiprep.pipeline import preprocess
from dsiprep.settings import MotionSettings, ResampleSettings, Settings
from helpers.bids_dataset import LAS, Dataset

AP: dict[str, Any] = {"PhaseEncodingDirection": "j-", "TotalReadoutTime": 0.05, "PartialFourier": 1}
PA: dict[str, Any] = {"PhaseEncodingDirection": "j", "TotalReadoutTime": 0.05, "PartialFourier": 1}
CHOSEN = Settings(resample=ResampleSettings(resolution=2.0))


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    dataset = Dataset(tmp_path / "bids", (4, 5, 6))
    dataset.dwi("sub-01_dir-AP", AP)
    return dataset


@pytest.fixture
def plan(dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*options: str) -> tuple[int, str, str]:
        arguments = [str(dataset.root), str(tmp_path / "out"), "participant", "--output-resolution", "2", "--dry-run"]
        code = cli.main([*arguments, "-w", str(tmp_path / "work"), *options])
        return code, *capsys.readouterr()

    return run


def damage_count(dataset: Dataset) -> None:
    (dataset.root / "sub-01/dwi/sub-01_dir-AP_dwi.bval").write_text("0 1000 1000\n")


def damage_vectors(value: str) -> Callable[[Dataset], None]:
    def damage(dataset: Dataset) -> None:
        path = dataset.root / "sub-01/dwi/sub-01_dir-AP_dwi.bvec"
        rows = [line.split() for line in path.read_text().splitlines()]
        for row in rows:
            row[4] = value
        path.write_text("\n".join(" ".join(row) for row in rows))

    return damage


def damage_header(dataset: Dataset) -> None:
    path = dataset.root / "sub-01/dwi/sub-01_dir-AP_dwi.nii.gz"
    image = nib.load(path)
    image.header.set_sform(LAS @ np.diag([0.5, 0.5, 0.5, 1]), 1)
    broken = nib.Nifti1Image(image.get_fdata(), None, image.header)
    broken.header.set_sform(LAS @ np.diag([0.5, 0.5, 0.5, 1]), 1)
    broken.to_filename(path)


def few_slices(dataset: Dataset) -> None:
    dataset.shape = (4, 5, 2)
    dataset.dwi("sub-01_dir-AP", AP)


def structural_series(dataset: Dataset) -> None:
    dataset.image("sub-01_T1w", 3, {})


def dangling_image(dataset: Dataset) -> None:
    path = dataset.image("sub-01_T1w", 1, {})
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_count, "3 b-values, but the image has 20 volumes"),
        (damage_vectors("nan"), "volume 4 .* is not a finite number although b > 0"),
        (damage_vectors("0.2"), "volume 4 .* has length 0.346"),
        (damage_vectors("0"), "volume 4 .* is zero although b > 0"),
        (damage_header, "1 x 1 x 1 mm in its sform but 2 x 2 x 2 mm in pixdim"),
        (few_slices, "2 slices; head motion is estimated in three dimensions"),
        (structural_series, "T1w.*3 volumes; expected a single 3-D image"),
        (dangling_image, "T1w.*a link whose target does not exist"),
    ],
)
def test_plan_refuses_what_the_run_refuses(damage: Callable[[Dataset], None], message: str, dataset: Dataset) -> None:
    damage(dataset)
    (planned,) = plan_page.plan_units(dataset.units(), CHOSEN)
    with pytest.raises(InputError, match=message) as refused:
        preprocess(dataset.unit(), CHOSEN)
    assert planned.problem == str(refused.value)


def test_refused_unit_fails_the_plan(dataset: Dataset, plan: Callable[..., tuple[int, str, str]]) -> None:
    damage_count(dataset)
    code, out, _ = plan()
    assert code == 1
    assert "  REFUSED: " in out


def test_plan_says_what_is_not_done_and_what_it_costs(
    dataset: Dataset, plan: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, _ = plan()
    assert code == 0
    assert "Not done: Distortion is not corrected: there are no images with phase encoding opposite to j-." in out
    assert "Not done: Nothing is aligned with a structural image or normalised: there is no T1w." in out
    assert re.search(r"Expected: about [01]\.\d CPU-minutes and 2\.0 GB of memory", out)
    assert "to the template MNI152" in out
    dataset.dwi("sub-01_dir-PA", PA)
    dataset.image("sub-01_T1w", 1, {})
    assert "Not done" not in plan()[1]


def test_plan_as_json(dataset: Dataset, plan: Callable[..., tuple[int, str, str]]) -> None:
    dataset.image("sub-01_T2w", 1, {})
    dataset.dwi("sub-02", {**AP, "TotalReadoutTime": -1})
    code, out, _ = plan("--json")
    content = json.loads(out)
    assert (code, content["accepted"]) == (1, False)
    (unit,) = content["units"]
    assert unit["runs"][0]["image"] == "sub-01/dwi/sub-01_dir-AP_dwi.nii.gz"
    assert unit["runs"][0]["phase_encoding"] == "j-"
    assert unit["scheme"]["kind"] == "single-shell"
    assert unit["refused"] is None
    assert unit["expected"]["memory_mb"] == BASE_MB
    assert "TotalReadoutTime" in content["refused_subjects"]["02"]
    assert content["unused"] == [{"image": "sub-01/anat/sub-01_T2w.nii.gz", "reason": "--anat-modality T1w"}]


def test_json_needs_dry_run() -> None:
    options = cli.build_parser().parse_args(["bids", "out", "participant", "--output-resolution", "2", "--json"])
    with pytest.raises(SettingsError, match="--json prints the plan; use it with --dry-run"):
        cli.read_settings(options)


def test_validator_is_run_on_request(
    dataset: Dataset, plan: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if plan("--validate")[0] == 2:
        pytest.skip("bids-validator-deno is not installed")
    (dataset.root / "nonsense.txt").write_text("x")
    code, _, message = plan("--validate")
    assert code == 1
    assert "not valid BIDS: NOT_INCLUDED /nonsense.txt" in message
    monkeypatch.setattr(plan_page, "VALIDATOR", "no-such-program")
    code, _, message = plan("--validate")
    assert code == 2
    assert "no-such-program is not installed" in message


@pytest.mark.parametrize("value", ["inf", "1e400", "nan", "1e308", "9" * 400])
@pytest.mark.parametrize("flag", ["--mem", "--b0-threshold", "--output-resolution", "--shoreline-iters", "--nprocs"])
def test_numbers_without_bounds(flag: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bids", str(tmp_path), "participant", "--output-resolution", "2", flag, value]
    try:
        assert cli.main(arguments) in (1, 2)
    except SystemExit as stop:
        assert stop.code == 2  # noqa: PT017
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "unexpected" not in message


def test_checked_unit_with_fieldmap(dataset: Dataset) -> None:
    link = {"IntendedFor": "dwi/sub-01_dir-AP_dwi.nii.gz"}
    dataset.image("sub-01_phasediff", 1, {"EchoTime1": 0.01, "EchoTime2": 0.012, **link})
    dataset.image("sub-01_magnitude1", 1, {})
    check_unit(dataset.unit(), CHOSEN)
    dataset.image("sub-01_magnitude1", 1, {}, affine=np.diag([3.0, 2, 2, 1]))
    with pytest.raises(InputError, match="its grid differs"):
        check_unit(dataset.unit(), CHOSEN)


def test_slice_motion_needs_slice_times(tmp_path: Path) -> None:
    folder = Dataset(tmp_path / "slices", shape=(4, 5, 6))
    folder.dwi("sub-01", {**AP, "SliceTiming": [0, 0.5]})
    asked = replace(CHOSEN, motion=MotionSettings(slices="on"))
    check_unit(folder.unit(), CHOSEN)
    with pytest.raises(MetadataError, match=r"sub-01_dwi\.nii\.gz: --slice-motion on needs SliceTiming"):
        check_unit(folder.unit(), asked)
    folder.dwi("sub-01", {**AP, "SliceTiming": [0, 0.5, 1, 0, 0.5, 1], "SliceEncodingDirection": "k-"})
    check_unit(folder.unit(), asked)
