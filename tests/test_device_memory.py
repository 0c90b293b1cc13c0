"""Fallbacks when a GPU runs out of memory: smaller chunks, then the CPU, each with a warning in the log."""

from __future__ import annotations

import logging
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from dsiprep.api import blip_pair
from dsiprep.data.results import Distortion
from dsiprep.device import free_bytes, in_chunks, with_cpu_fallback
from helpers.epi_pair import Case, make_grid

CPU = torch.device("cpu")


def test_stage_is_repeated_on_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def stage(values: torch.Tensor) -> tuple[torch.Tensor, str]:
        calls.append(values.device.type)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 2 * values, "done"

    with caplog.at_level(logging.WARNING):
        doubled, message = with_cpu_fallback(stage, CPU, (torch.arange(3),))
    assert doubled.tolist() == [0, 2, 4]
    assert message == "done"
    assert len(calls) == 2
    assert "running this stage on the CPU" in caplog.text


def test_free_memory_without_proc_is_half_of_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS, which has no /proc and whose sysconf does not know free pages."""

    def missing(path: Path, *_: object, **__: object) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": 2**20, "SC_PAGE_SIZE": 2**14}.__getitem__)
    assert free_bytes(CPU) == 2**33


def test_other_errors_are_raised() -> None:
    def stage(values: torch.Tensor) -> torch.Tensor:
        raise ValueError("something else")

    with pytest.raises(ValueError, match="something else"):
        with_cpu_fallback(stage, CPU, (torch.arange(3),))


@pytest.mark.parametrize("count", [1, 7, 16])
def test_chunks_are_halved_until_they_fit_in_memory(count: int, caplog: pytest.LogCaptureFixture) -> None:
    """With memory for three items per chunk, every item is computed once and in order."""
    sizes = []

    def double(part: slice) -> torch.Tensor:
        sizes.append(part.stop - part.start)
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 2 * torch.arange(part.start, part.stop)

    with caplog.at_level(logging.WARNING):
        done = torch.cat(in_chunks(double, count, 1, CPU))
    assert done.tolist() == [2 * i for i in range(count)]
    assert ("GPU out of memory: continuing in chunks" in caplog.text) == (count > 3)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_gpu_with_little_memory_takes_smaller_chunks_then_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    gpu, mebibyte = torch.device("cuda", 0), 2**20

    def squares(part: slice) -> torch.Tensor:
        """Eight items take 256 MiB."""
        index = torch.arange(part.start, part.stop, device=gpu)
        return (index[:, None].float() * torch.ones(8 * mebibyte, device=gpu))[:, 0] ** 2

    def stage(values: torch.Tensor) -> torch.Tensor:
        return values.expand(64, *values.shape).contiguous()[:, 0]

    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(160 * mebibyte / torch.cuda.get_device_properties(gpu).total_memory, gpu)
    try:
        with caplog.at_level(logging.WARNING):
            done = torch.cat(in_chunks(squares, 8, 1, gpu)).cpu()
            moved = with_cpu_fallback(stage, gpu, (torch.ones(mebibyte),))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, gpu)
    assert done.tolist() == [n * n for n in range(8)]
    assert moved.device.type == "cpu"
    assert "continuing in chunks" in caplog.text
    assert "running this stage on the CPU" in caplog.text


def test_single_item_that_does_not_fit_raises() -> None:
    def never(part: slice) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        in_chunks(never, 4, 1, CPU)


def test_pepolar_correction_falls_back_to_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    case, calls = Case(make_grid("LAS", sizes=(8.0, 8.0, 8.0)), 1), []
    for name, image in zip(("up", "down"), case.images, strict=True):
        nib.save(nib.Nifti1Image(image[0].numpy(), case.grid.affine), tmp_path / f"{name}.nii.gz")
    original = blip_pair.correct_distortion

    def fail_once(*inputs: object) -> Distortion:
        calls.append(inputs)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*inputs)  # type: ignore[arg-type]

    monkeypatch.setattr(blip_pair, "correct_distortion", fail_once)
    with caplog.at_level(logging.WARNING):
        result = blip_pair.correct_pair(tmp_path / "up.nii.gz", tmp_path / "down.nii.gz", pe_dir="j")
    assert len(calls) == 2
    assert "running this stage on the CPU" in caplog.text
    assert np.isfinite(result.dwiref.numpy()).all()
