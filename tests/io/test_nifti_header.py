"""Headers: sform, qform and pixdim that disagree, and headers that describe no image."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from dsiprep.errors import InputError
from dsiprep.io.files import check_file, read_bytes
from dsiprep.io.nifti import read_image, read_volume
from dsiprep.io.nifti_header import read_grid, read_header, read_shape
from helpers.bids_dataset import LAS


def image(folder: Path, nifti: Any = nib.Nifti1Image, qform: np.ndarray | None = LAS) -> Path:
    made = nifti(np.ones((4, 5, 3), np.float32), LAS)
    made.set_sform(LAS, 1)
    made.set_qform(qform, 1 if qform is not None else 0)
    made.to_filename(folder / "a.nii")
    return folder / "a.nii"


def test_sform_and_qform_that_agree_give_no_note(tmp_path: Path) -> None:
    rotated = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.1, 0.2, 0.3) @ LAS[:3, :3], LAS[:3, 3])
    made = nib.Nifti1Image(np.ones((4, 5, 3), np.float32), rotated)
    made.set_qform(rotated, 1)
    made.to_filename(tmp_path / "a.nii")
    assert read_header(tmp_path / "a.nii").note == ""


def test_sform_is_taken_where_qform_is_elsewhere(tmp_path: Path) -> None:
    moved = LAS.copy()
    moved[:3, 3] += (0, 30, 40)
    path = image(tmp_path, qform=moved)
    header = read_header(path)
    assert "up to 50.0 mm apart; the sform was taken" in header.note
    np.testing.assert_allclose(read_volume(path).grid.affine, LAS)


@pytest.mark.parametrize("with_qform", [True, False])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_sform_of_half_the_voxel_size_is_refused(with_qform: bool, suffix: str, tmp_path: Path) -> None:
    path = image(tmp_path, qform=LAS if with_qform else None)
    made = nib.load(path)
    made.header.set_sform(LAS @ np.diag([0.5, 0.5, 0.5, 1]), 1)
    content = made.header.binaryblock + path.read_bytes()[348:]
    path = tmp_path / f"b{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    for read in (read_grid, read_image):
        with pytest.raises(InputError, match=r"voxels of 1 x 1 x 1 mm in its sform but 2 x 2 x 2 mm in pixdim"):
            read(path)


def test_rounded_voxel_sizes_are_accepted(tmp_path: Path) -> None:
    path = image(tmp_path)
    header = nib.load(path).header
    header["pixdim"][1:4] = (2.004, 2, 2)
    path.write_bytes(header.binaryblock + path.read_bytes()[348:])
    np.testing.assert_allclose(read_grid(path).voxel_sizes, 2)


@pytest.mark.parametrize("nifti", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("dims", [(-4, 5, 3), (0, 5, 3), (2**40, 5, 3), (32767, 32767, 32767), (4, 5, -1)])
def test_impossible_dimensions_are_refused(nifti: Any, dims: tuple[int, ...], tmp_path: Path) -> None:
    path = image(tmp_path, nifti)
    header = nib.load(path).header.copy()
    kept = [min(max(n, -32768), 32767) for n in dims] if nifti is nib.Nifti1Image else list(dims)
    header["dim"][1:4] = kept
    path.write_bytes(header.binaryblock + path.read_bytes()[header.sizeof_hdr :])
    with pytest.raises(InputError, match=r"a\.nii"):
        read_image(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vox_offset", np.nan),
        ("vox_offset", -5e30),
        ("datatype", 4242),
        ("scl_inter", np.inf),
        ("bitpix", -3),
        ("vox_offset", 0),
    ],
)
def test_damaged_fields_are_refused_or_ignored(field: str, value: float, tmp_path: Path) -> None:
    path = image(tmp_path)
    header = nib.load(path).header.copy()
    header["vox_offset"] = 352  # nibabel resets it
    header[field] = value
    path.write_bytes(header.binaryblock + path.read_bytes()[348:])
    if field in ("bitpix", "scl_inter"):  # the data type counts, and without a slope nothing is scaled
        assert read_image(path)[0].shape == (4, 5, 3)
        return
    with pytest.raises(InputError, match=r"a\.nii"):
        read_image(path)


def test_extra_dimensions_of_one_voxel(tmp_path: Path) -> None:
    nib.Nifti1Image(np.ones((4, 5, 3, 1, 1)), LAS).to_filename(tmp_path / "a.nii")
    assert read_shape(tmp_path / "a.nii") == (4, 5, 3)
    assert read_volume(tmp_path / "a.nii").data.shape == (4, 5, 3)


@pytest.mark.parametrize(
    "content",
    [b"\x1f\x8b", b"\x1f\x8b\x08\x00" + b"\x00" * 96, gzip.compress(b"x" * 3000), b""],
    ids=["magic number", "header of zeros", "no NIfTI inside", "empty"],
)
def test_short_compressed_files_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").write_bytes(content)
    for read in (read_header, read_image):
        with pytest.raises(InputError, match=r"a\.nii\.gz"):
            read(tmp_path / "a.nii.gz")


def test_what_is_no_file(tmp_path: Path) -> None:
    """The same sentence for every reader, none of which waits for a pipe or reads a device to its end."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, target in (("dangling", "nowhere"), ("zero", "/dev/zero"), ("self", "/proc/self"), ("loop", "loop")):
        (tmp_path / name).symlink_to(target)
    (tmp_path / "maps").symlink_to("/proc/self/maps")
    for name, message in (
        ("folder", "a folder; expected a file"),
        ("pipe", "a named pipe; expected a file"),
        ("dangling", "a link whose target does not exist; fetch its content"),
        ("zero", "a device; expected a file"),
        ("self", "a folder; expected a file"),
        ("loop", "a link whose target does not exist"),
        ("maps", "which is not a data file"),
        ("missing", "there is no such file"),
    ):
        for read in (check_file, read_bytes, read_header, read_image):
            with pytest.raises(InputError, match=f"{name}: .*{message}"):
                read(tmp_path / name)
