"""Gradient-echo phase in the ranges in which scanners and converters store it."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from dsiprep.data.acquisition import GreFieldmap
from dsiprep.data.raw import RawFieldmap
from dsiprep.errors import InputError
from dsiprep.io.fieldmaps import read_fieldmap
from helpers.bids_dataset import LAS

SHAPE = (12, 14, 10)


def wrapped() -> np.ndarray:
    """Phase in radians with every value from -pi to pi, as noise outside the head has."""
    return (
        np.random.default_rng(0).permutation(np.linspace(-np.pi, np.pi, np.prod(SHAPE), endpoint=False)).reshape(SHAPE)
    )


def read(folder: Path, *phases: np.ndarray) -> RawFieldmap:
    paths = []
    for number, data in enumerate((*phases, np.ones(SHAPE, np.float32))):
        paths.append(folder / f"image{number}.nii.gz")
        nib.Nifti1Image(data, LAS).to_filename(paths[-1])
    kind = "phasediff" if len(phases) == 1 else "phases"
    return read_fieldmap(GreFieldmap(kind, tuple(paths[:-1]), paths[-1], 0.0025))


def error(found: RawFieldmap, phase: np.ndarray) -> float:
    return float(np.abs(np.angle(np.exp(1j * (found.field.numpy() - phase)))).max())


STORED = {
    "0 to 4095": lambda p: np.floor((p + np.pi) / (2 * np.pi) * 4096).astype(np.int16),
    "0 to 4096": lambda p: np.rint((p + np.pi) / (2 * np.pi) * 4096).astype(np.int16),
    "-4096 to 4095": lambda p: np.floor(p / np.pi * 4096).astype(np.int16),
    "-3142 to 3142": lambda p: np.rint(p * 1000).astype(np.int16),
    "-pi to pi": lambda p: p.astype(np.float32),
    "0 to 2 pi": lambda p: np.mod(p, 2 * np.pi).astype(np.float32),
    "degrees": lambda p: np.degrees(p).astype(np.float32),
}


@pytest.mark.parametrize("stored", STORED)
def test_phase_is_read_in_radians(tmp_path: Path, stored: str) -> None:
    found = read(tmp_path, STORED[stored](wrapped()))
    assert error(found, wrapped()) < 0.004
    assert (found.notes == ()) == ("pi" in stored)


@pytest.mark.parametrize("stored", ["0 to 4095", "-4096 to 4095", "-pi to pi"])
def test_masked_phase_that_spans_part_of_a_cycle_is_not_stretched(tmp_path: Path, stored: str) -> None:
    phase = wrapped() / 4
    found = read(tmp_path, STORED[stored](phase))
    assert error(found, phase) < 0.004
    if found.notes:
        assert "span only a part" in found.notes[0]


def test_two_phase_images_share_one_range(tmp_path: Path) -> None:
    first, second = wrapped() / 3, wrapped()
    found = read(tmp_path, *(STORED["-4096 to 4095"](phase) for phase in (first, second)))
    assert error(found, second - first) < 0.004


@pytest.mark.parametrize("low_high", [(0, 300), (-9000, 9000), (0, 200000), (-100, 100)])
def test_unknown_range_is_refused(tmp_path: Path, low_high: tuple[int, int]) -> None:
    data = np.linspace(*low_high, np.prod(SHAPE)).reshape(SHAPE).astype(np.int32)
    with pytest.raises(InputError, match=r"fit no known range .*convert the image to radians"):
        read(tmp_path, data)
