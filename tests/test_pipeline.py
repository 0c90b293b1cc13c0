"""The whole app on a small phantom: outputs, truth, resume, independent readers, one bad subject among good ones."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from dsiprep.cli import app as cli
from dsiprep.score import score
from helpers.fibres import series, single_fibres
from helpers.small_run import command


@pytest.fixture(scope="module")
def finished(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    assert cli.main(command(phantom, out, "--keep-work")) == 0
    return out


def fingerprint(out: Path) -> dict[str, str]:
    """Contents of all images, transforms and tables; times and dates of reports are left aside."""
    kinds = (".nii.gz", ".tsv", ".bvec", ".bval", ".b", ".txt", ".csv", ".mat", ".h5")
    files = [path for path in out.rglob("*") if path.name.endswith(kinds) and "logs" not in path.parts]
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_errors_against_the_truth_are_small(finished: Path, phantom: Path) -> None:
    """Bounds for 5 mm voxels and the cheapest settings; the demo and the benchmarks hold the real ones."""
    found = {entry.name: entry.value for entry in score(finished, phantom / "truth")}
    assert found["motion: displacement"] < 1.0
    assert found["b-vectors: .bvec"] < 3.0


def test_report_and_methods_are_there(finished: Path) -> None:
    page = (finished / "sub-01.html").read_text()
    assert "3dSHORE" in page and "could not be drawn" not in page
    for name in ("CITATION.md", "CITATION.html", "CITATION.tex", "CITATION.bib"):
        assert (finished / "logs" / name).stat().st_size > 200
    assert json.loads((finished / "dataset_description.json").read_text())["DatasetType"] == "derivative"


PEAKS = 6.0  # degrees; 4 are found here, and 9 or more where an axis of the b-vectors is turned around


def tensor_peaks(image: nib.Nifti1Image, voxels: np.ndarray, bvals: np.ndarray, bvecs: np.ndarray) -> np.ndarray:
    """First eigenvectors of the tensors that dipy fits at some voxels, in the frame of the b-vectors."""
    from dipy.core.gradients import gradient_table
    from dipy.reconst.dti import TensorModel

    low = bvals < 2500
    table = gradient_table(bvals[low], bvecs=bvecs[low], b0_threshold=100)
    return TensorModel(table).fit(np.asarray(image.dataobj)[tuple(voxels.T)][:, low]).evecs[..., 0]


def test_dipy_finds_the_fibres_of_the_phantom(finished: Path, phantom: Path) -> None:
    """The tensor that dipy fits to .bval and .bvec points along the known fibres, in the world of the T1w."""
    from dipy.io import read_bvals_bvecs

    fibres, stem = single_fibres(finished, phantom), str(series(finished))
    image = nib.load(f"{stem}.nii.gz")
    assert len(fibres.voxels) > 100
    peaks = tensor_peaks(image, fibres.voxels, *read_bvals_bvecs(f"{stem}.bval", f"{stem}.bvec"))
    axes = image.affine[:3, :3] / np.linalg.norm(image.affine[:3, :3], axis=0)
    flip = np.diag([-1.0 if np.linalg.det(axes) > 0 else 1.0, 1, 1])
    assert fibres.angle(peaks @ (axes @ flip).T) < PEAKS


def test_the_b_table_of_dsi_studio_finds_them_too(finished: Path, phantom: Path) -> None:
    """DSI Studio turns an image to L, P, S axes, as it lies here already, and takes b x y z along them."""
    fibres, stem = single_fibres(finished, phantom), str(series(finished))
    image = nib.load(f"{stem}.nii.gz")
    assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
    table = np.loadtxt(f"{stem}.b_table.txt")
    assert table.shape == (image.shape[3], 4)
    assert np.allclose(table[:, 0], np.loadtxt(f"{stem}.bval"), atol=0.5)
    length = np.linalg.norm(table[:, 1:], axis=1)
    assert np.allclose(length[table[:, 0] > 100], 1, atol=1e-5)
    peaks = tensor_peaks(image, fibres.voxels, table[:, 0], table[:, 1:])
    assert fibres.angle(peaks * [-1, -1, 1]) < PEAKS


def mrtrix(*words: object) -> str:
    """Output of a command of MRtrix3."""
    if shutil.which("mrinfo") is None:
        pytest.skip("MRtrix3 is not installed (apt-get install mrtrix3)")
    run = [str(word) for word in (*words, "-quiet", "-nthreads", "0")]
    return subprocess.run(run, capture_output=True, text=True, check=True).stdout


def test_mrtrix_reads_the_series_and_its_gradients(finished: Path) -> None:
    """Size, voxels and place of the image; and .b is the same table as .bvec and .bval, whose frames differ."""
    stem = str(series(finished))
    image = nib.as_closest_canonical(nib.load(f"{stem}.nii.gz"))
    dwi = (f"{stem}.nii.gz", "-grad", f"{stem}.b")
    assert [int(n) for n in mrtrix("mrinfo", *dwi, "-size").split()] == list(image.shape)
    place = np.array(mrtrix("mrinfo", *dwi, "-transform").split(), float).reshape(4, 4)
    assert np.allclose(place[:3, 3], image.affine[:3, 3], atol=1e-3)
    assert np.allclose(place[:3, :3], image.affine[:3, :3] / image.header.get_zooms()[:3], atol=1e-5)
    tables = [
        np.array(mrtrix("mrinfo", f"{stem}.nii.gz", *words, "-dwgrad", "-bvalue_scaling", "false").split(), float)
        for words in (("-grad", f"{stem}.b"), ("-fslgrad", f"{stem}.bvec", f"{stem}.bval"))
    ]
    assert np.allclose(*tables, atol=1e-4)


def test_mrtrix_finds_the_fibres_of_the_phantom(finished: Path, phantom: Path, tmp_path: Path) -> None:
    """Peaks of dwi2tensor with the .b file, which MRtrix3 gives in world coordinates, along the known fibres."""
    fibres, stem = single_fibres(finished, phantom), str(series(finished))
    low = ",".join(str(v) for v in np.flatnonzero(np.loadtxt(f"{stem}.bval") < 2500))
    few, tensor, vectors = (tmp_path / name for name in ("few.mif", "tensor.nii", "vectors.nii"))
    mrtrix("mrconvert", f"{stem}.nii.gz", "-grad", f"{stem}.b", "-coord", "3", low, few)
    mrtrix("dwi2tensor", few, tensor)
    mrtrix("tensor2metric", tensor, "-vector", vectors, "-modulate", "none")
    found = nib.load(vectors)
    where = nib.affines.apply_affine(np.linalg.inv(found.affine) @ nib.load(f"{stem}.nii.gz").affine, fibres.voxels)
    peaks = np.asarray(found.dataobj)[tuple(np.rint(where).astype(int).T)]
    assert fibres.angle(np.nan_to_num(peaks)) < PEAKS


def test_derivatives_are_valid_bids(finished: Path) -> None:
    program = Path(sys.executable).with_name("bids-validator-deno")
    done = subprocess.run([program, finished, "--format", "json"], capture_output=True, text=True, check=False)
    issues = json.loads(done.stdout)["issues"]["issues"]
    errors = [f"{i['code']} {i.get('location')}" for i in issues if i["severity"] == "error"]
    assert not errors


def test_a_run_that_was_stopped_goes_on_with_identical_outputs(finished: Path, phantom: Path, tmp_path: Path) -> None:
    """Every stage after motion is taken away, as if the run had been killed there; then once more from nothing."""
    work, out = tmp_path / "work", tmp_path / "out"
    shutil.copytree(finished.parent / "work", work)
    kept = ("acquisition", "denoise", "motion")
    for folder in (work / "sub-01").iterdir():
        if not folder.name.startswith(kept):
            shutil.rmtree(folder)
    before = {path.name: path.stat().st_mtime_ns for path in (work / "sub-01").iterdir()}
    assert cli.main(command(phantom, out, "--keep-work")) == 0
    after = {path.name: path.stat().st_mtime_ns for path in (work / "sub-01").iterdir()}
    assert {name: after[name] for name in before} == before
    assert fingerprint(out) == fingerprint(finished)


def test_finished_work_is_removed_and_another_motion_setting_reruns_motion_only(
    finished: Path, phantom: Path, tmp_path: Path
) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    shutil.copytree(finished.parent / "work", work)
    names = {path.name for path in (work / "sub-01").iterdir()}
    assert cli.main(command(phantom, out, "--keep-work", "--hmc-transform", "Affine")) == 0
    new = {path.name.split("-")[0] for path in (work / "sub-01").iterdir() if path.name not in names}
    assert "motion" in new and "resample" in new
    assert not new & {"acquisition", "denoise", "anatomy"}
    assert cli.main(command(phantom, out)) == 0
    assert not (work / "sub-01").exists()


def test_reports_only_computes_nothing(finished: Path, phantom: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = fingerprint(finished)
    (finished / "sub-01.html").unlink()
    assert cli.main(command(phantom, finished, "--reports-only")) == 0
    assert (finished / "sub-01.html").exists() and fingerprint(finished) == before
    assert cli.main(command(phantom, finished, "--reports-only", "--shoreline-iters", "2", "--hmc-tolerance", "1")) == 1
    assert "--keep-work" in capsys.readouterr().err


def test_dry_run_says_what_would_be_done(phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command(phantom, tmp_path / "out", "--dry-run")) == 0
    said = capsys.readouterr().out
    assert "sub-01_dir-PA_dwi.nii.gz" in said and "sub-01_dir-AP_epi.nii.gz" in said
    assert "Compressed-sensing DSI" in said and "3dSHORE" in said and "drbuddi" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [("--hmc-method", "eddy"), ("--sdc-method", "topup"), ("--pepolar-method", "TOPUP")])
def test_shell_tools_are_refused_on_a_lattice(
    phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, str]
) -> None:
    assert cli.main(command(phantom, tmp_path / "out", *words)) == 2
    said = capsys.readouterr().err
    assert "suit shelled data" in said and "--hmc-method shoreline --sdc-method drbuddi" in said


def test_one_bad_subject_does_not_stop_the_others(
    phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bids = tmp_path / "bids"
    shutil.copytree(phantom / "bids", bids)
    shutil.copytree(bids / "sub-01", bids / "sub-00")
    for path in sorted((bids / "sub-00").rglob("sub-01*")):
        path.rename(path.with_name(path.name.replace("sub-01", "sub-00")))
    image = next((bids / "sub-00" / "dwi").glob("*.nii.gz"))
    image.write_bytes(image.read_bytes()[:20000])
    words = command(
        phantom, tmp_path / "out", "--hmc-method", "none", "--ignore", "fieldmaps", "--anat-modality", "none"
    )
    assert cli.main([str(bids), *words[1:]]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "failed" in said and "done" in said and "Traceback" not in said
    assert "Traceback" in (next((tmp_path / "out" / "logs").glob("sub-00*.log"))).read_text()
    assert list((tmp_path / "out" / "sub-01" / "dwi").glob("*desc-preproc_dwi.nii.gz"))
    lines = next((tmp_path / "out").rglob("*_timeseries.tsv")).read_text().splitlines()
    rows = [dict(zip(lines[0].split("\t"), line.split("\t"), strict=True)) for line in lines[1:]]
    assert all((row["hmc_r2"] == "n/a") == (float(row["bval"]) > 100) for row in rows)  # nothing predicted them
    assert not (tmp_path / "out" / "sub-00" / "dwi").exists()


def test_input_is_never_touched(finished: Path, phantom: Path) -> None:
    assert finished.exists()
    names = sorted(path.relative_to(phantom / "bids").as_posix() for path in (phantom / "bids").rglob("*"))
    assert not [name for name in names if "derivatives" in name or "work" in name]
