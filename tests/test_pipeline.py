"""The command line on a small phantom: accuracy, outputs, resuming, third-party readers and failing subjects."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dipy.io import read_bvals_bvecs

from dsiprep.cli import app as cli
from dsiprep.phantom import make_phantom
from dsiprep.score import score
from helpers.fibres import fsl_table, mrtrix, mrtrix_peaks, series, single_fibres, tensor_peaks
from helpers.small_run import SMALL, command, fingerprint


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_phantom(tmp_path_factory.mktemp("phantom"), SMALL)


@pytest.fixture(scope="module")
def finished(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    assert cli.main(command(phantom, out, "--keep-work")) == 0
    return out


def test_motion_and_bvectors_match_the_truth(finished: Path, phantom: Path) -> None:
    """Bounds for voxels of 5 mm and --sloppy; the benchmarks measure the accuracy with default settings."""
    scores = {entry.name: entry.value for entry in score(finished, phantom / "truth")}
    assert scores["motion: displacement"] < 1.0
    for table in (".bvec", ".b", "_fslbvecs.txt"):
        assert scores[f"b-vectors: {table}"] < 3.0


def test_report_and_methods_text_are_written(finished: Path) -> None:
    page = (finished / "sub-01.html").read_text()
    assert "3dSHORE" in page
    assert "could not be drawn" not in page
    for name in ("CITATION.md", "CITATION.html", "CITATION.tex", "CITATION.bib"):
        assert (finished / "logs" / name).stat().st_size > 200
    assert json.loads((finished / "dataset_description.json").read_text())["DatasetType"] == "derivative"


MAX_FIBRE_ANGLE = 6.0  # degrees, mean; the error is about 5, and at least 18 if an axis of the b-vectors is flipped
FLIPS = np.array([[-1.0, 1, 1], [1, -1, 1], [1, 1, -1]])


def test_dipy_tensors_align_with_the_phantom_fibres(finished: Path, phantom: Path) -> None:
    """DIPY reads .bval and .bvec as they are: components along the axes of the image, here L, P, S."""
    fibres, stem = single_fibres(finished, phantom), str(series(finished))
    image = nib.load(f"{stem}.nii.gz")
    assert len(fibres.voxels) > 100
    signals = np.asarray(image.dataobj)[tuple(fibres.voxels.T)]
    axes = image.affine[:3, :3] / np.linalg.norm(image.affine[:3, :3], axis=0)
    bvals, bvecs = read_bvals_bvecs(f"{stem}.bval", f"{stem}.bvec")
    error = fibres.angle(tensor_peaks(signals, bvals, bvecs) @ axes.T)
    assert error < MAX_FIBRE_ANGLE
    assert error < min(fibres.angle(tensor_peaks(signals, bvals, bvecs * flip) @ axes.T) for flip in FLIPS)


def test_dsi_studio_b_table_aligns_with_the_phantom_fibres(finished: Path, phantom: Path) -> None:
    """DSI Studio reorients images to LPS, the orientation of the output, and reads b, x, y, z along these axes."""
    fibres, stem = single_fibres(finished, phantom), str(series(finished))
    image = nib.load(f"{stem}.nii.gz")
    assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
    table = np.loadtxt(f"{stem}.b_table.txt")
    assert table.shape == (image.shape[3], 4)
    assert np.allclose(table[:, 0], np.loadtxt(f"{stem}.bval"), atol=0.5)
    length = np.linalg.norm(table[:, 1:], axis=1)
    assert np.allclose(length[table[:, 0] > 100], 1, atol=1e-5)
    peaks = tensor_peaks(np.asarray(image.dataobj)[tuple(fibres.voxels.T)], table[:, 0], table[:, 1:])
    assert fibres.angle(peaks * [-1, -1, 1]) < MAX_FIBRE_ANGLE


def test_mrtrix_reads_geometry_and_gradients(finished: Path) -> None:
    """Image size and affine; and .b describes the same gradients as FSL's table and .bval, in another frame."""
    stem = str(series(finished))
    image = nib.as_closest_canonical(nib.load(f"{stem}.nii.gz"))
    dwi = (f"{stem}.nii.gz", "-grad", f"{stem}.b")
    assert [int(n) for n in mrtrix("mrinfo", *dwi, "-size").split()] == list(image.shape)
    transform = np.array(mrtrix("mrinfo", *dwi, "-transform").split(), float).reshape(4, 4)
    assert np.allclose(transform[:3, 3], image.affine[:3, 3], atol=1e-3)
    assert np.allclose(transform[:3, :3], image.affine[:3, :3] / image.header.get_zooms()[:3], atol=1e-5)
    tables = [
        np.array(mrtrix("mrinfo", f"{stem}.nii.gz", *gradients, "-dwgrad", "-bvalue_scaling", "false").split(), float)
        for gradients in (("-grad", f"{stem}.b"), ("-fslgrad", fsl_table(stem), f"{stem}.bval"))
    ]
    assert np.allclose(*tables, atol=1e-4)


@pytest.mark.parametrize("option", ["-grad", "-fslgrad"])
def test_mrtrix_tensors_align_with_the_phantom_fibres(
    finished: Path, phantom: Path, tmp_path: Path, option: str
) -> None:
    """First eigenvectors of dwi2tensor, which are in world coordinates."""
    fibres, stem = single_fibres(finished, phantom), str(series(finished))
    files = {"-grad": (f"{stem}.b",), "-fslgrad": (fsl_table(stem), f"{stem}.bval")}[option]
    assert fibres.angle(mrtrix_peaks(stem, fibres.voxels, (option, *files), tmp_path)) < MAX_FIBRE_ANGLE


def test_derivatives_are_valid_bids(finished: Path) -> None:
    program = Path(sys.executable).with_name("bids-validator-deno")
    done = subprocess.run([program, finished, "--format", "json"], capture_output=True, text=True, check=False)
    issues = json.loads(done.stdout)["issues"]["issues"]
    errors = [f"{i['code']} {i.get('location')}" for i in issues if i["severity"] == "error"]
    assert not errors


def test_bids_uris_in_sidecars_resolve(finished: Path, phantom: Path) -> None:
    description = json.loads((finished / "dataset_description.json").read_text())
    roots = {"": finished, "raw": finished / description["DatasetLinks"]["raw"]}
    assert roots["raw"].resolve() == (phantom / "bids").resolve()
    found = []
    for path in finished.rglob("*.json"):
        sidecar = json.loads(path.read_text())
        found += [sidecar["SpatialReference"]] if "SpatialReference" in sidecar else []
        found += sidecar.get("Sources", [])
    assert len(found) > 10
    for uri in {uri for uri in found if not uri.startswith("MNI")}:  # a template is named by its BIDS identifier
        _, dataset, relative = uri.split(":", 2)
        assert (roots[dataset] / relative).is_file(), uri


def test_interrupted_run_resumes_with_identical_outputs(finished: Path, phantom: Path, tmp_path: Path) -> None:
    """The cached results after the motion stage are deleted, as if the run had been interrupted there."""
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


def test_changed_motion_setting_recomputes_dependent_stages_and_work_is_removed(
    finished: Path, phantom: Path, tmp_path: Path
) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    shutil.copytree(finished.parent / "work", work)
    names = {path.name for path in (work / "sub-01").iterdir()}
    assert cli.main(command(phantom, out, "--keep-work", "--hmc-transform", "Affine")) == 0
    new = {path.name.split("-")[0] for path in (work / "sub-01").iterdir() if path.name not in names}
    assert "motion" in new
    assert "resample" in new
    assert not new & {"acquisition", "denoise", "anatomy"}
    assert cli.main(command(phantom, out)) == 0
    assert not (work / "sub-01").exists()


def test_reports_only_computes_nothing(finished: Path, phantom: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = fingerprint(finished)
    (finished / "sub-01.html").unlink()
    assert cli.main(command(phantom, finished, "--reports-only")) == 0
    assert (finished / "sub-01.html").exists()
    assert fingerprint(finished) == before
    assert cli.main(command(phantom, finished, "--reports-only", "--shoreline-iters", "2", "--hmc-tolerance", "1")) == 1
    assert "--keep-work" in capsys.readouterr().err


def test_dry_run_prints_the_plan(phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command(phantom, tmp_path / "out", "--dry-run")) == 0
    plan = capsys.readouterr().out
    assert "sub-01_dir-PA_dwi.nii.gz" in plan
    assert "sub-01_dir-AP_epi.nii.gz" in plan
    assert "Compressed-sensing DSI" in plan
    assert "3dSHORE" in plan
    assert "drbuddi" in plan
    assert not (tmp_path / "out").exists()


def test_eddy_is_rejected_for_data_without_shells(
    phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command(phantom, tmp_path / "out", "--hmc-method", "eddy")) == 2
    message = capsys.readouterr().err
    assert "FSL eddy needs shelled data" in message
    assert "use --hmc-method shoreline" in message


@pytest.mark.parametrize("arguments", [("--sdc-method", "topup"), ("--pepolar-method", "TOPUP")])
def test_topup_is_rejected(
    phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(command(phantom, tmp_path / "out", *arguments))
    assert stop.value.code == 2
    assert "use --sdc-method drbuddi" in capsys.readouterr().err


def test_failing_subject_does_not_stop_the_others(
    phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bids = tmp_path / "bids"
    shutil.copytree(phantom / "bids", bids)
    shutil.copytree(bids / "sub-01", bids / "sub-00")
    for path in sorted((bids / "sub-00").rglob("sub-01*")):
        path.rename(path.with_name(path.name.replace("sub-01", "sub-00")))
    image = next((bids / "sub-00" / "dwi").glob("*.nii.gz"))
    image.write_bytes(image.read_bytes()[:20000])
    arguments = command(
        phantom, tmp_path / "out", "--hmc-method", "none", "--ignore", "fieldmaps", "--anat-modality", "none"
    )
    assert cli.main([str(bids), *arguments[1:]]) == 1
    message = " ".join(capsys.readouterr().err.split())
    assert "failed" in message
    assert "done" in message
    assert "Traceback" not in message
    assert "Traceback" in (next((tmp_path / "out" / "logs").glob("sub-00*.log"))).read_text()
    assert list((tmp_path / "out" / "sub-01" / "dwi").glob("*desc-preproc_dwi.nii.gz"))
    lines = next((tmp_path / "out").rglob("*_timeseries.tsv")).read_text().splitlines()
    rows = [dict(zip(lines[0].split("\t"), line.split("\t"), strict=True)) for line in lines[1:]]
    assert all((row["hmc_r2"] == "n/a") == (float(row["bval"]) > 100) for row in rows)  # without a prediction
    assert not (tmp_path / "out" / "sub-00" / "dwi").exists()


def test_nothing_is_written_to_the_input(finished: Path, phantom: Path) -> None:
    assert finished.exists()
    names = sorted(path.relative_to(phantom / "bids").as_posix() for path in (phantom / "bids").rglob("*"))
    assert not [name for name in names if "derivatives" in name or "work" in name]
