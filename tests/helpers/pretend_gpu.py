"""A GPU that is not there: tensors in the CPU's memory that say they are on cuda:0, and behave so.

Code for a GPU goes wrong in three ways that need no GPU to be seen: tensors of two devices meet, something is turned
into a NumPy array without `.cpu()`, or the body for other devices computes something else than the one for the CPU.
Under `pretend_gpu` the first two raise what torch raises, and the third shows in numbers.
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
LEAVES = (torch.Tensor.numpy, torch.Tensor.__array__)
MEET = (torch.Tensor.copy_, torch.Tensor.__setitem__)  # what may take a tensor of another device


class Lent(torch.Tensor):
    """A tensor that says it is on the GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl


def _back(item: Any) -> Any:
    return item.as_subclass(torch.Tensor) if isinstance(item, Lent) else item


def _lent(item: Any) -> Any:
    return item.as_subclass(Lent) if isinstance(item, torch.Tensor) and not isinstance(item, Lent) else item


def _names_gpu(item: Any) -> bool:
    return (isinstance(item, torch.device) and item.type == "cuda") or (
        isinstance(item, str) and item.startswith("cuda")
    )


def _names_device(item: Any) -> bool:
    return isinstance(item, torch.device) or (isinstance(item, str) and item.split(":")[0] in ("cpu", "cuda"))


class _Mode(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        owner = args[0] if args else None
        if func is torch.device:
            return func(*args, **kwargs)
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return GPU if isinstance(owner, Lent) else func(*args)
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return isinstance(owner, Lent)
        if func in LEAVES and isinstance(owner, Lent):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        leaves = tree_flatten((args, kwargs))[0]
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        named = [leaf for leaf in leaves if _names_device(leaf)]
        result = func(*tree_map(_plain, args), **tree_map(_plain, kwargs))
        if func is torch.Tensor.cpu:
            return result
        if func is torch.Tensor.to:
            wanted = [_names_gpu(leaf) for leaf in named] or [isinstance(t, Lent) for t in tensors[-1:]]
            return _lent(result) if wanted[0] else result
        self._check(func, owner, tensors)
        on = any(map(_names_gpu, named)) if named else any(isinstance(t, Lent) for t in tensors)
        return tree_map(_lent, result) if on else result

    def _check(self, func: Callable[..., Any], owner: Any, tensors: list[torch.Tensor]) -> None:
        """As torch: no two devices in one operation, but for single numbers, indices on the CPU, and copies."""
        kinds = {isinstance(t, Lent) for t in tensors if t.dim() > 0}
        index = func is torch.Tensor.__getitem__ and isinstance(owner, Lent)
        if len(kinds) > 1 and not index and func not in MEET:
            name = getattr(func, "__name__", func)
            raise RuntimeError(f"{name}: Expected all tensors to be on the same device, found cuda:0 and cpu")


def _plain(item: Any) -> Any:
    return torch.device("cpu") if _names_gpu(item) else _back(item)


@contextmanager
def pretend_gpu() -> Iterator[torch.device]:
    """Within it `torch.device("cuda", 0)` is there and has 8 GB free."""
    patches = {
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "mem_get_info": lambda device=None: (8 * 2**30, 8 * 2**30),
        "empty_cache": lambda: None,
    }
    with mock.patch.multiple(torch.cuda, **patches), _Mode():
        yield GPU
