"""A simulated GPU: tensors in CPU memory that report the device cuda:0 and follow its rules.

Three kinds of error in GPU code can be detected without a GPU: an operation mixes tensors of two devices, a tensor is
converted to NumPy without `.cpu()`, or the GPU branch of a function computes something else than its CPU branch. Under
`pretend_gpu` the first two raise the errors of torch, and the third shows as a numerical difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

GPU = torch.device("cuda", 0)
TO_NUMPY = (torch.Tensor.numpy, torch.Tensor.__array__)
DEVICE_MIXING = (torch.Tensor.copy_, torch.Tensor.__setitem__)  # functions that accept a tensor of another device


class SimulatedGpuTensor(torch.Tensor):
    """A tensor that reports to be on the simulated GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl


def _as_cpu_tensor(item: Any) -> Any:
    return item.as_subclass(torch.Tensor) if isinstance(item, SimulatedGpuTensor) else item


def _as_gpu_tensor(item: Any) -> Any:
    return (
        item.as_subclass(SimulatedGpuTensor)
        if isinstance(item, torch.Tensor) and not isinstance(item, SimulatedGpuTensor)
        else item
    )


def _names_gpu(item: Any) -> bool:
    return (isinstance(item, torch.device) and item.type == "cuda") or (
        isinstance(item, str) and item.startswith("cuda")
    )


def _names_device(item: Any) -> bool:
    return isinstance(item, torch.device) or (isinstance(item, str) and item.split(":")[0] in ("cpu", "cuda"))


class _GpuMode(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        owner = args[0] if args else None
        if func is torch.device:
            return func(*args, **kwargs)
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return GPU if isinstance(owner, SimulatedGpuTensor) else func(*args)
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return isinstance(owner, SimulatedGpuTensor)
        if func in TO_NUMPY and isinstance(owner, SimulatedGpuTensor):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        leaves = tree_flatten((args, kwargs))[0]
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        named = [leaf for leaf in leaves if _names_device(leaf)]
        result = func(*tree_map(_without_gpu, args), **tree_map(_without_gpu, kwargs))
        if func is torch.Tensor.cpu:
            return result
        if func is torch.Tensor.to:
            to_gpu = [_names_gpu(leaf) for leaf in named] or [isinstance(t, SimulatedGpuTensor) for t in tensors[-1:]]
            return _as_gpu_tensor(result) if to_gpu[0] else result
        self._check(func, owner, tensors)
        on_gpu = any(map(_names_gpu, named)) if named else any(isinstance(t, SimulatedGpuTensor) for t in tensors)
        return tree_map(_as_gpu_tensor, result) if on_gpu else result

    def _check(self, func: Callable[..., Any], owner: Any, tensors: list[torch.Tensor]) -> None:
        """Like torch, reject operations on two devices, except for scalars, CPU indices and copies."""
        devices = {isinstance(t, SimulatedGpuTensor) for t in tensors if t.dim() > 0}
        index = func is torch.Tensor.__getitem__ and isinstance(owner, SimulatedGpuTensor)
        if len(devices) > 1 and not index and func not in DEVICE_MIXING:
            name = getattr(func, "__name__", func)
            raise RuntimeError(f"{name}: Expected all tensors to be on the same device, found cuda:0 and cpu")


def _without_gpu(item: Any) -> Any:
    return torch.device("cpu") if _names_gpu(item) else _as_cpu_tensor(item)


@contextmanager
def pretend_gpu() -> Iterator[torch.device]:
    """Context manager in which `torch.device("cuda", 0)` exists and has 8 GB of free memory."""
    patches = {
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "mem_get_info": lambda device=None: (8 * 2**30, 8 * 2**30),
        "empty_cache": lambda: None,
    }
    with mock.patch.multiple(torch.cuda, **patches), _GpuMode():
        yield GPU
