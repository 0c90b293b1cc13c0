"""Reading and writing of NIfTI images, and errors for invalid files."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from dsiprep.data.grid import Grid
from dsiprep.errors import InputError
from dsiprep.io.nifti import (
    ALIGNED,
    MNI,
    SCANNER,
    read_image,
    read_series,
    read_volume,
    to_lps,
    write_image,
)
from dsiprep.io.nifti_header import read_shape
from helpers.bids_dataset import LAS


def ramp(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii"])
def test_images_round_trip(name: str, tmp_path: Path) -> None:
    grid = Grid((4, 5, 3), LAS)
    data = ramp((6, 4, 5, 3)) - 7.25
    write_image(tmp_path / name, torch.from_numpy(data), grid)
    read_data, read_grid = read_image(tmp_path / name)
    np.testing.assert_array_equal(read_data, data)
    assert read_grid.matches(grid)
    by_nibabel = nib.load(tmp_path / name)
    np.testing.assert_array_equal(by_nibabel.get_fdata(), np.moveaxis(data, 0, 3))
    assert by_nibabel.get_data_dtype() == np.float32
    np.testing.assert_allclose(by_nibabel.header.get_qform(), LAS, atol=1e-6)
    assert read_shape(tmp_path / name) == (4, 5, 3, 6)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_simpleitk_reads_written_images(tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    write_image(tmp_path / "a.nii.gz", ramp((6, 4, 5, 3)), Grid((4, 5, 3), LAS))
    array = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "a.nii.gz")))
    np.testing.assert_array_equal(array.transpose(0, 3, 2, 1), ramp((6, 4, 5, 3)))


def test_equal_data_give_identical_files(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "b.nii.gz"):
        write_image(tmp_path / name, ramp((4, 5, 3)), Grid((4, 5, 3), LAS), discrete=False)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_masks_are_stored_as_uint8(tmp_path: Path) -> None:
    write_image(tmp_path / "a.nii.gz", np.ones((4, 5, 3), bool), Grid((4, 5, 3), LAS), discrete=True)
    assert nib.load(tmp_path / "a.nii.gz").get_data_dtype() == np.uint8
    assert read_volume(tmp_path / "a.nii.gz").data.sum() == 60


def test_scaled_integers_singleton_axes_and_nifti2_are_read(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(4, 5, 3, 1, 1), LAS)
    image.header.set_slope_inter(0.5, 2)
    image.to_filename(tmp_path / "a.nii")
    expected = np.asarray(nib.load(tmp_path / "a.nii").dataobj)[..., 0, 0]
    np.testing.assert_allclose(read_volume(tmp_path / "a.nii").numpy(), expected)
    nib.Nifti2Image(ramp((4, 5, 3)), LAS).to_filename(tmp_path / "b.nii")
    np.testing.assert_array_equal(read_image(tmp_path / "b.nii")[0], ramp((4, 5, 3)))


@pytest.mark.parametrize("codes", ["RAS", "LAS", "PSR", "LPS", "SPR"])
def test_to_lps_agrees_with_nibabel(codes: str) -> None:
    orient = nib.orientations.axcodes2ornt(tuple(codes))
    sheared = np.array([[2.0, 0.1, 0, 5], [0, 3, 0.2, -5], [0.1, 0, 4, 1], [0, 0, 0, 1]])
    start = nib.Nifti1Image(ramp((4, 5, 3)), sheared)
    image = start.as_reoriented(orient)
    grid = Grid(image.shape, image.affine)
    data, lps = to_lps(np.stack([image.get_fdata()] * 2), grid)
    assert nib.aff2axcodes(lps.affine) == ("L", "P", "S")
    assert data.shape == (2, *lps.shape)
    expected = start.as_reoriented(nib.orientations.axcodes2ornt(("L", "P", "S")))
    np.testing.assert_array_equal(data[1], expected.get_fdata())
    np.testing.assert_allclose(lps.affine, expected.affine)


def test_damaged_files_raise(tmp_path: Path) -> None:
    whole = tmp_path / "whole.nii.gz"
    noise = np.random.default_rng(0).normal(size=(20, 4, 5, 3)).astype(np.float32)
    write_image(whole, noise, Grid((4, 5, 3), LAS))
    content = whole.read_bytes()
    for stop in (len(content) // 2, len(content) - 4, 30):
        (tmp_path / "cut.nii.gz").write_bytes(content[:stop])
        with pytest.raises(InputError, match=r"cut\.nii\.gz.*truncated"):
            read_image(tmp_path / "cut.nii.gz")
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 255
    (tmp_path / "cut.nii.gz").write_bytes(bytes(flipped))
    with pytest.raises(InputError, match=r"truncated or damaged"):
        read_image(tmp_path / "cut.nii.gz")
    (tmp_path / "cut.nii").write_bytes(gzip.decompress(content)[:-100])
    with pytest.raises(InputError, match=r"cut\.nii: the file is truncated"):
        read_image(tmp_path / "cut.nii")
    for junk in (b"", b"hello", b"x" * 1000):
        (tmp_path / "junk.nii").write_bytes(junk)
        with pytest.raises(InputError, match=r"junk\.nii: not readable as NIfTI"):
            read_image(tmp_path / "junk.nii")
    with pytest.raises(InputError, match=r"none\.nii: there is no such file"):
        read_image(tmp_path / "none.nii")


def test_gzip_streams_of_several_members_and_with_padding(tmp_path: Path) -> None:
    data = ramp((6, 4, 5, 3))
    write_image(tmp_path / "a.nii", data, Grid((4, 5, 3), LAS))
    content = (tmp_path / "a.nii").read_bytes()
    for name, stream in (
        ("members", gzip.compress(content[:500]) + gzip.compress(content[500:])),
        ("padded", gzip.compress(content) + bytes(512)),
        ("more", gzip.compress(content + bytes(10**8), 9)),  # what follows the voxels is not decompressed
    ):
        (tmp_path / f"{name}.nii.gz").write_bytes(stream)
        np.testing.assert_array_equal(read_image(tmp_path / f"{name}.nii.gz")[0], data)


def test_nan_and_infinite_values_raise(tmp_path: Path) -> None:
    data = ramp((6, 4, 5, 3))
    data[2, 1, 1] = np.nan
    data[5, 0, 0, 0] = np.inf
    write_image(tmp_path / "a.nii.gz", data, Grid((4, 5, 3), LAS))
    with pytest.raises(InputError, match=r"a\.nii\.gz: 4 values in volumes 2, 5 .* not numbers"):
        read_image(tmp_path / "a.nii.gz")


def test_wrong_dimensions_raise(tmp_path: Path) -> None:
    write_image(tmp_path / "flat.nii.gz", ramp((4, 5, 3)), Grid((4, 5, 3), LAS))
    write_image(tmp_path / "many.nii.gz", ramp((6, 4, 5, 3)), Grid((4, 5, 3), LAS))
    with pytest.raises(InputError, match=r"flat.*single volume of 4 x 5 x 3 voxels; expected .*series \(4-D\)"):
        read_series(tmp_path / "flat.nii.gz")
    with pytest.raises(InputError, match=r"many.*6 volumes; expected a single 3-D image"):
        read_volume(tmp_path / "many.nii.gz")
    nib.Nifti1Image(np.zeros((4, 5, 3), np.complex64), LAS).to_filename(tmp_path / "c.nii")
    with pytest.raises(InputError, match="complex64; expected real numbers"):
        read_image(tmp_path / "c.nii")


def test_images_without_orientation_raise(tmp_path: Path) -> None:
    image = nib.Nifti1Image(ramp((4, 5, 3)), None)
    image.header["sform_code"] = image.header["qform_code"] = 0
    image.to_filename(tmp_path / "a.nii")
    with pytest.raises(InputError, match=r"sform and qform codes are 0"):
        read_image(tmp_path / "a.nii")


@pytest.mark.parametrize(("space", "code"), [(SCANNER, 1), (ALIGNED, 2), (MNI, 4)])
def test_header_names_the_space_and_the_repetition_time(tmp_path: Path, space: int, code: int) -> None:
    series, grid = np.zeros((2, 4, 5, 3), np.float32), Grid((4, 5, 3), LAS)
    write_image(tmp_path / "a.nii", series, grid, space=space, repetition_time=3.3)
    header = nib.load(tmp_path / "a.nii").header
    assert int(header["sform_code"]) == int(header["qform_code"]) == code
    assert header.get_zooms()[3] == pytest.approx(3.3)
    assert header.get_xyzt_units() == ("mm", "sec")
    write_image(tmp_path / "b.nii", series, grid)
    assert nib.load(tmp_path / "b.nii").header.get_xyzt_units() == ("mm", "unknown")
