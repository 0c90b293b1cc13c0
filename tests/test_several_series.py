"""Several series of one subject without a structural image: registration of their b=0 references."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from dsiprep import jobs
from dsiprep.cache import Cache
from dsiprep.data.acquisition import PhaseEncoding, Run, Unit
from dsiprep.io.bids import find_units
from dsiprep.jobs import Job, run_subject
from dsiprep.ops.image.affine import rigid_matrix
from dsiprep.phantom import PhantomSettings, make_phantom
from dsiprep.pipeline import preprocess
from dsiprep.plan import choose_lead
from dsiprep.settings import DenoiseSettings, DistortionSettings, MotionSettings, ResampleSettings, Settings

HEAD_POSE = rigid_matrix(np.array([0.1, -0.05, 0.3, 12.0, -25.0, 18.0]))  # of the second series relative to the first


def unit(name: str, *directions: str, subject: str = "01") -> Unit:
    runs = [Run(Path(d), Path(d), Path(d), PhaseEncoding.from_bids(d)) for d in directions]
    return Unit(subject, None, name, tuple(runs))


def test_lead_is_the_first_series_with_distortion_correction() -> None:
    units = [unit("a", "j"), unit("b", "j", "j-"), unit("c", "j", "j-"), unit("d", "j", "j-", subject="02")]
    assert [choose_lead(each, units, Settings()).name for each in units] == ["b", "b", "b", "d"]
    off = Settings(distortion=DistortionSettings(method="none"))
    assert choose_lead(units[2], units, off).name == "a"


def test_failed_series_is_not_chosen_as_lead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    units = (unit("a", "j"), unit("b", "j", "j-"), unit("c", "j"))
    job = Job("01", units, Settings(), tmp_path / "out", tmp_path / "work", mode="anat_only")
    leads = []

    def fail_for_b(unit: Unit, job: Job, on_step: object) -> None:
        leads.append((unit.name, choose_lead(unit, job.units, job.settings).name))
        if unit.name == "b":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(jobs, "_run_unit", fail_for_b)
    outcomes = list(run_subject(job, lambda unit, step: None))
    assert leads == [("b", "b"), ("a", "a"), ("c", "a")]
    assert [outcome.error is None for outcome in outcomes] == [False, True, True]


@pytest.fixture(scope="module")
def two_series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with two copies of one series and no T1w; the affine of the second has another head pose."""
    folder = tmp_path_factory.mktemp("two_series")
    phantom = make_phantom(
        folder / "phantom", PhantomSettings(scheme="hasc55", resolution=5.0, t1w_resolution=4.0, ideal=True, seed=4)
    )
    bids = folder / "bids"
    (bids / "sub-01" / "dwi").mkdir(parents=True)
    shutil.copy(phantom / "bids" / "dataset_description.json", bids)
    for source in (phantom / "bids" / "sub-01" / "dwi").glob("*_dir-PA_dwi.*"):
        for name in ("one", "two"):
            shutil.copy(
                source, bids / "sub-01" / "dwi" / f"sub-01_acq-{name}_dir-PA_dwi.{source.name.split('.', 1)[1]}"
            )
    path = bids / "sub-01" / "dwi" / "sub-01_acq-two_dir-PA_dwi.nii.gz"
    image = nib.load(path)
    data = np.asarray(image.dataobj)
    nib.save(nib.Nifti1Image(data, HEAD_POSE @ image.affine), path)
    return bids


def test_two_series_are_registered_to_a_common_space(two_series: Path, tmp_path: Path) -> None:
    settings = Settings(
        denoise=DenoiseSettings(method="none", biascorrect="none"),
        motion=MotionSettings(method="none"),
        resample=ResampleSettings(8.0),
    )
    one, two = find_units(two_series, settings, ignore=frozenset({"fieldmaps"}))
    cache = Cache(tmp_path)
    # the second series first, before its lead has been processed
    second = preprocess(two, settings, cache, lead=choose_lead(two, (one, two), settings))
    first = preprocess(one, settings, cache, lead=choose_lead(one, (one, two), settings))
    assert len(list(tmp_path.glob("anatomy-b0-*"))) == 1
    matrices = [results.coregistration.dwiref_to_acpc.matrix for results in (first, second)]
    head = np.array([[x, y, z, 1.0] for x in (-60, 60) for y in (-80, 60) for z in (-30, 60)])
    assert np.linalg.norm((head @ (matrices[1] - HEAD_POSE @ matrices[0]).T)[:, :3], axis=1).max() < 1.0
    assert first.coregistration.metric == "none"
    assert second.coregistration.metric == "cc"
    assert second.coregistration.target_unit == one.name
    assert second.coregistration.score_before < 0.8 < 0.95 < second.coregistration.score_after
