"""A GPU that runs out of memory: smaller chunks, then the CPU, each with a line in the log."""

from __future__ import annotations

import logging
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from dsiprep.data.results import Distortion
from dsiprep.device import in_chunks, with_cpu_fallback
from dsiprep.standalone import blip_pair as pair
from helpers.epi_pair import Case, make_grid

CPU = torch.device("cpu")


def test_a_stage_goes_on_on_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def stage(values: torch.Tensor) -> tuple[torch.Tensor, str]:
        calls.append(values.device.type)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 2 * values, "done"

    with caplog.at_level(logging.WARNING):
        doubled, word = with_cpu_fallback(stage, CPU, (torch.arange(3),))
    assert doubled.tolist() == [0, 2, 4] and word == "done" and len(calls) == 2
    assert "this stage goes on on the CPU" in caplog.text


def test_a_failure_of_another_kind_is_not_hidden() -> None:
    def stage(values: torch.Tensor) -> torch.Tensor:
        raise ValueError("something else")

    with pytest.raises(ValueError, match="something else"):
        with_cpu_fallback(stage, CPU, (torch.arange(3),))


@pytest.mark.parametrize("count", [1, 7, 16])
def test_chunks_are_halved_until_they_fit(count: int, caplog: pytest.LogCaptureFixture) -> None:
    """Not more than three items at once, as if memory ended there; all come out, once and in order."""
    sizes = []

    def double(part: slice) -> torch.Tensor:
        sizes.append(part.stop - part.start)
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 2 * torch.arange(part.start, part.stop)

    with caplog.at_level(logging.WARNING):
        done = torch.cat(in_chunks(double, count, 1, CPU))
    assert done.tolist() == [2 * i for i in range(count)]
    assert ("GPU out of memory: going on in chunks" in caplog.text) == (count > 3)


def test_one_item_that_does_not_fit_is_an_error() -> None:
    def never(part: slice) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        in_chunks(never, 4, 1, CPU)


def test_a_pair_is_corrected_although_memory_ran_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    case, calls = Case(make_grid("LAS", sizes=(8.0, 8.0, 8.0)), 1), []
    for name, image in zip(("up", "down"), case.images, strict=True):
        nib.save(nib.Nifti1Image(image[0].numpy(), case.grid.affine), tmp_path / f"{name}.nii.gz")
    real = pair.correct_distortion

    def short_of_memory(*inputs: object) -> Distortion:
        calls.append(inputs)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*inputs)  # type: ignore[arg-type]

    monkeypatch.setattr(pair, "correct_distortion", short_of_memory)
    with caplog.at_level(logging.WARNING):
        result = pair.correct_pair(tmp_path / "up.nii.gz", tmp_path / "down.nii.gz", pe_dir="j")
    assert len(calls) == 2 and "goes on on the CPU" in caplog.text
    assert np.isfinite(result.dwiref.numpy()).all()
