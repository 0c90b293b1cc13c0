"""Several series of one person without a structural image: they are brought together, whichever comes first."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from dsiprep import jobs as scale
from dsiprep.cache import Cache
from dsiprep.data.acquisition import PhaseEncoding, Run, Unit
from dsiprep.io.bids import find_units
from dsiprep.jobs import Job, run_subject
from dsiprep.ops.image.affine import rigid_matrix
from dsiprep.phantom import PhantomSettings, make_phantom
from dsiprep.pipeline import preprocess
from dsiprep.plan import choose_lead
from dsiprep.settings import DenoiseSettings, DistortionSettings, MotionSettings, ResampleSettings, Settings

TURNED = rigid_matrix(np.array([0.1, -0.05, 0.3, 12.0, -25.0, 18.0]))  # the head in the second series


def unit(name: str, *directions: str, subject: str = "01") -> Unit:
    runs = [Run(Path(d), Path(d), Path(d), PhaseEncoding.from_bids(d)) for d in directions]
    return Unit(subject, None, name, tuple(runs))


def test_the_series_whose_distortion_is_corrected_leads() -> None:
    units = [unit("a", "j"), unit("b", "j", "j-"), unit("c", "j", "j-"), unit("d", "j", "j-", subject="02")]
    assert [choose_lead(one, units, Settings()).name for one in units] == ["b", "b", "b", "d"]
    off = Settings(distortion=DistortionSettings(method="none"))
    assert choose_lead(units[2], units, off).name == "a"


def test_a_series_that_failed_leads_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    units = (unit("a", "j"), unit("b", "j", "j-"), unit("c", "j"))
    job = Job("01", units, Settings(), tmp_path / "out", tmp_path / "work", mode="anat_only")
    led = []

    def run(one: Unit, job: Job, tell: object) -> None:
        led.append((one.name, choose_lead(one, job.units, job.settings).name))
        if one.name == "b":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(scale, "_run_unit", run)
    outcomes = list(run_subject(job, lambda unit, step: None))
    assert led == [("b", "b"), ("a", "a"), ("c", "a")]
    assert [outcome.error is None for outcome in outcomes] == [False, True, True]


@pytest.fixture(scope="module")
def two_series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One series twice, the second with the head turned and moved (in its header), no T1w."""
    folder = tmp_path_factory.mktemp("people")
    made = make_phantom(
        folder / "phantom", PhantomSettings(scheme="hasc55", resolution=5.0, t1w_resolution=4.0, ideal=True, seed=4)
    )
    bids = folder / "bids"
    (bids / "sub-01" / "dwi").mkdir(parents=True)
    shutil.copy(made / "bids" / "dataset_description.json", bids)
    for source in (made / "bids" / "sub-01" / "dwi").glob("*_dir-PA_dwi.*"):
        for name in ("one", "two"):
            shutil.copy(
                source, bids / "sub-01" / "dwi" / f"sub-01_acq-{name}_dir-PA_dwi.{source.name.split('.', 1)[1]}"
            )
    path = bids / "sub-01" / "dwi" / "sub-01_acq-two_dir-PA_dwi.nii.gz"
    image = nib.load(path)
    data = np.asarray(image.dataobj)
    nib.save(nib.Nifti1Image(data, TURNED @ image.affine), path)
    return bids


def test_two_series_come_to_lie_in_one_space(two_series: Path, tmp_path: Path) -> None:
    settings = Settings(
        denoise=DenoiseSettings(method="none", biascorrect="none"),
        motion=MotionSettings(method="none"),
        resample=ResampleSettings(8.0),
    )
    one, two = find_units(two_series, settings, ignore=frozenset({"fieldmaps"}))
    cache = Cache(tmp_path)
    late = preprocess(two, settings, cache, lead=choose_lead(two, (one, two), settings))  # before the one that leads
    early = preprocess(one, settings, cache, lead=choose_lead(one, (one, two), settings))
    assert len(list(tmp_path.glob("anatomy-b0-*"))) == 1
    matrices = [results.coregistration.dwiref_to_acpc.matrix for results in (early, late)]
    head = np.array([[x, y, z, 1.0] for x in (-60, 60) for y in (-80, 60) for z in (-30, 60)])
    assert np.linalg.norm((head @ (matrices[1] - TURNED @ matrices[0]).T)[:, :3], axis=1).max() < 1.0
    assert early.coregistration.metric == "none" and late.coregistration.metric == "cc"
    assert late.coregistration.led_by == one.name
    assert late.coregistration.score_before < 0.8 < 0.95 < late.coregistration.score_after
