"""Noise of the difference of two images, estimated from the images themselves."""

from __future__ import annotations

import torch

from dsiprep.ops.image.filters import gaussian

__all__ = ["difference_noise"]

MODEL_ERROR = 0.02  # of the brain's intensity: images never agree better
NOISE_WINDOW = 1.5  # voxels


def difference_noise(images: tuple[torch.Tensor, ...], brains: tuple[torch.Tensor, ...]) -> float:
    """Standard deviation of the difference of correctly aligned images, `MODEL_ERROR` included.

    Estimated from differences along all three axes at once, which remove most of the anatomy, in the smoothest tenth of
    the brain; `brains` are its masks in the images.
    """
    total = MODEL_ERROR**2
    for image, brain in zip(images, brains, strict=True):
        difference, mask = image, brain
        for axis in range(3):
            if image.shape[axis] > 1:
                difference = torch.diff(difference, dim=axis) / 2**0.5
                mask = mask.narrow(axis, 1, image.shape[axis] - 1)
        local = gaussian((difference * difference)[None].contiguous(), NOISE_WINDOW)[0][mask]
        if local.numel():
            total += float(local.kthvalue(int(0.1 * local.numel()) + 1).values)
    return float(total**0.5)
