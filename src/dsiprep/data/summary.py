"""One-line representations of dataclasses that hold arrays."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch

__all__ = ["Summarised"]

LONGEST = 40  # characters of a value that are shown


class Summarised:
    """Base of dataclasses (made with `repr=False`) whose repr is one line: arrays by their shape, parts by name."""

    def __repr__(self) -> str:
        parts = (f"{entry.name}={_short(getattr(self, entry.name))}" for entry in fields(self))  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(parts)})"


def _short(value: Any) -> str:
    if isinstance(value, np.ndarray | torch.Tensor):
        return f"{'x'.join(map(str, value.shape)) or 'scalar'} {str(value.dtype).removeprefix('torch.')}"
    if is_dataclass(value):
        return type(value).__name__
    if isinstance(value, tuple | list | dict) and len(repr(value)) > LONGEST:
        return f"{type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
