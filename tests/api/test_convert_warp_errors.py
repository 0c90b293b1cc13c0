"""`convert-warp` with unusable files or options: a one-line error, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from dsiprep.api.convert_warp import KINDS, convert_warp
from dsiprep.cli.tools import main
from dsiprep.data.grid import Grid
from dsiprep.data.transform import Affine, DisplacementField
from dsiprep.errors import DsiprepError, InputError, OutputError, SettingsError
from dsiprep.io import itk
from helpers.grids import make_grid
from helpers.smooth_warp import FIXED, LPS, TILT, centres, displacement, image_at


def vectors(path: Path, values: np.ndarray, grid: Grid, intent: int, axes: int = 4, description: bytes = b"") -> Path:
    """Write a vector image with any intent code, number of axes and description."""
    data = np.moveaxis(values, 0, -1).astype(np.float32)
    image = nib.Nifti1Image(data if axes == 4 else data[:, :, :, None], grid.affine)
    image.header.set_intent(intent, allow_unknown=True)
    image.header["descrip"] = description
    nib.save(image, path)
    return path


def test_ambiguous_vector_image_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    grid = make_grid("LAS", FIXED, (2, 2, 2))
    u = displacement(grid)
    out, path = tmp_path / "out.h5", tmp_path / "in.nii"
    coordinates = np.moveaxis(centres(grid) * LPS, -1, 0) + u
    for message, *arguments in (
        ("intent 2018", u, grid, 2018),
        ("--source", u, grid, 2006),
        ("fnirtfileutils", u, grid, 2007),
        ("like coordinates", coordinates, grid, 1007, 5),
        ("--kind", u, grid, 0, 5),
        ("--kind", u, grid, 0, 4, b"6.0.5:9e026117"),
    ):
        vectors(path, *arguments)
        with pytest.raises(InputError, match=message):
            convert_warp(path, out)
    assert not out.exists()
    assert main(["convert-warp", str(path), str(out)]) == 1
    assert "--kind" in capsys.readouterr().err
    assert main(["convert-warp", str(path), str(out), "--kind", "freesurfer"]) == 0
    with pytest.raises(SystemExit):
        main(["convert-warp", str(path), str(out), "--kind", "other"])
    message = capsys.readouterr().err
    assert all(kind in message for kind in KINDS)


def test_file_that_is_no_transform_is_rejected(tmp_path: Path) -> None:
    itk.write_affine_series(tmp_path / "two.txt", np.stack([np.eye(4)] * 2))
    image_at(tmp_path / "t1.nii", make_grid("LAS", FIXED, (2, 2, 2)))
    for name, content, message in (
        ("t1.nii", None, "three real numbers"),
        ("absent.nii", None, "does not exist"),
        ("two.txt", None, "exactly one"),
        ("flirt.mat", b"1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\n", "FLIRT"),
        ("morph.m3z", b"\x3f\x80\0\0" + bytes(400), "mri_warp_convert"),
        ("empty.nii.gz", b"", "unknown format"),
        ("half.nii.gz", b"\x1f\x8b\x08\x00abc", "intact copy"),
        ("photo.png", b"\x89PNG\r\n", "unknown format"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            convert_warp(tmp_path / name, tmp_path / "out.h5")
    assert not (tmp_path / "out.h5").exists()


def test_impossible_output_is_rejected(tmp_path: Path) -> None:
    grid = make_grid("LAS", FIXED, (2, 2, 2))
    good, linear, out = tmp_path / "good.nii.gz", tmp_path / "linear.mat", tmp_path / "out.h5"
    itk.write_displacement_nifti(good, DisplacementField(torch.from_numpy(displacement(grid)), grid))
    itk.write_affine(linear, Affine(TILT, "", ""))
    distant = make_grid("LAS", (5, 5, 5), (2, 2, 2)).affine
    distant[:3, 3] += 900
    outside = image_at(tmp_path / "distant.nii", Grid((5, 5, 5), distant))
    calls: list[tuple[type[DsiprepError], str, Callable[[], object]]] = [
        (SettingsError, "must end in", lambda: convert_warp(good, tmp_path / "out.png")),
        (SettingsError, "--to freesurfer", lambda: convert_warp(good, out, to="freesurfer")),
        (SettingsError, "linear transforms only", lambda: convert_warp(good, tmp_path / "out.mat")),
        (OutputError, "never overwritten", lambda: convert_warp(good, good)),
        (InputError, "--source", lambda: convert_warp(good, tmp_path / "o.nii", to="freesurfer")),
        (InputError, "--reference", lambda: convert_warp(linear, tmp_path / "o.nii")),
        (InputError, "requires a linear", lambda: convert_warp(good, out, affine=good)),
        (
            InputError,
            "does not cover",
            lambda: convert_warp(good, tmp_path / "o.h5", invert=True, source=outside),
        ),
        (OutputError, "absent", lambda: convert_warp(good, tmp_path / "absent" / "o.nii")),
    ]
    for error, message, call in calls:
        with pytest.raises(error, match=message):
            call()
