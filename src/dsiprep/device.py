"""Device, threads, and chunks that fit into memory. The only file that names CUDA devices."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numba
import torch

from dsiprep.errors import SettingsError

log = logging.getLogger("dsiprep")
T = TypeVar("T")


def choose(name: str = "auto") -> torch.device:
    """The torch device for "auto", "cpu", "cuda" or "cuda:N".

    Raises
    ------
    SettingsError
        If there is no GPU of that number.
    """
    check_name(name)
    count = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    device = torch.device(name)
    if (device.index or 0) >= count:
        found = f"{count} CUDA device{'s' if count != 1 else ''}"
        raise SettingsError(f"--device {name}: torch sees {found} here; use --device cpu or auto")
    return device


def check_name(name: str) -> None:
    """Refuse what cannot name a device, whether or not this machine has it.

    Raises
    ------
    SettingsError
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise SettingsError(f"--device {name}: not one of auto, cpu, cuda, cuda:N")


def gpu_of_slot(name: str, slot: int) -> dict[str, str]:
    """Environment in which the process in one of several slots sees all GPUs, and its own as the first.

    Empty if the device is not "auto" or "cuda", or if there are fewer than two GPUs.
    """
    if name not in ("auto", "cuda"):
        return {}
    seen = _visible_gpus() or [str(number) for number in range(torch.cuda.device_count())]
    if len(seen) < 2:
        return {}
    first = slot % len(seen)
    return {"CUDA_VISIBLE_DEVICES": ",".join(seen[first:] + seen[:first])}


def _visible_gpus() -> list[str]:
    """Entries of CUDA_VISIBLE_DEVICES."""
    return [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]


def use_threads(count: int) -> None:
    """Limit torch and Numba to `count` threads each."""
    count = max(1, min(count, os.cpu_count() or 1))
    torch.set_num_threads(count)
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]


def free_bytes(device: torch.device) -> int:
    """Bytes that may be allocated on `device` now; on the CPU, within the memory limit of a container or job."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, ValueError, KeyError):  # macOS does not say what is free: half of what there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    try:
        return min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no control group, or "max": no limit
        return free


def release_gpu(device: torch.device) -> dict[str, str]:
    """Release GPU memory that torch keeps in reserve, so that another program can use it.

    Returns
    -------
    dict
        Environment variables under which that program sees this GPU only; empty on the CPU.
    """
    if device.type != "cuda":
        return {}
    torch.cuda.empty_cache()
    index = torch.cuda.current_device() if device.index is None else device.index
    seen = _visible_gpus()
    return {"CUDA_VISIBLE_DEVICES": seen[index] if index < len(seen) else str(index)}


def in_chunks(
    function: Callable[[slice], torch.Tensor], count: int, bytes_each: int, device: torch.device
) -> list[torch.Tensor]:
    """Apply `function` to slices of `range(count)` that fit into memory, halving them when a GPU runs out.

    Parameters
    ----------
    function : slice -> Tensor
        Computes items `start:stop`.
    count : int
        Number of items.
    bytes_each : int
        Peak memory of one item.
    device : torch.device
        Where `function` runs.

    Raises
    ------
    torch.OutOfMemoryError
        If not even one item fits.
    """
    size = max(1, min(count, int(0.5 * free_bytes(device)) // max(1, bytes_each)))
    done: list[torch.Tensor] = []
    start = 0
    while start < count:
        try:
            done.append(function(slice(start, min(count, start + size))))
            start += size
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size = (size + 1) // 2
            torch.cuda.empty_cache()
            log.warning("GPU out of memory: continuing in chunks of %d", size)
    return done


def with_cpu_fallback(function: Callable[..., T], device: torch.device, movable: Sequence[object]) -> T:
    """Call `function(*movable)` on `device`, and again on the CPU if the GPU runs out of memory.

    Items of `movable` that have a `.to` method are moved first. The result is returned on the CPU.
    """
    try:
        return to_cpu(function(*(_moved(item, device) for item in movable)))
    except torch.OutOfMemoryError:
        log.warning("GPU out of memory: running this stage on the CPU")
        torch.cuda.empty_cache()
        return to_cpu(function(*(_moved(item, torch.device("cpu")) for item in movable)))


def to_cpu(item: Any) -> Any:
    """The same result with all its tensors on the CPU."""
    if isinstance(item, torch.Tensor):
        return item.cpu()
    if isinstance(item, tuple | list):
        return type(item)(to_cpu(part) for part in item)
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        parts = {f.name: to_cpu(getattr(item, f.name)) for f in dataclasses.fields(item)}
        return dataclasses.replace(item, **parts)
    return item


def _moved(item: object, device: torch.device) -> object:
    return item.to(device) if hasattr(item, "to") else item
