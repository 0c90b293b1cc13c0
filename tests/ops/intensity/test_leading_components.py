"""Leading components beside a full decomposition."""

from __future__ import annotations

import pytest
import torch

from dsiprep.ops.intensity.leading_components import leading_components

SIDE, SAMPLES = 270, 343
EDGE = (SIDE**0.5 + SAMPLES**0.5) ** 2  # of noise of variance 1


def matrices(ranks: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Gram matrices of noise of variance 1 with signals of given ranks, (b, d, d)."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for rank in ranks:
        signal, loads = (torch.randn(size, rank, dtype=dtype, generator=generator) for size in (SAMPLES, SIDE))
        patch = torch.randn(SAMPLES, SIDE, dtype=dtype, generator=generator)
        patch += (signal * torch.linspace(0.5, 5, rank)) @ loads.mH
        found.append(patch.mH @ patch)
    return torch.stack(found)


@pytest.mark.parametrize("ranks", [[0, 3, 20], [10, 120]], ids=["few components", "more than the subspace holds"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_projection_on_components_above_the_bound(ranks: list[int], dtype: torch.dtype) -> None:
    gram = matrices(ranks, dtype)
    values, vectors = leading_components(gram, torch.full((len(ranks),), EDGE))
    expected, basis = torch.linalg.eigh(gram)
    for matrix in range(len(ranks)):
        clear = expected[matrix] > 1.1 * EDGE
        count = int(clear.sum())
        assert count >= 0.9 * ranks[matrix]
        assert int((values[matrix] > 1.1 * EDGE).sum()) == count
        if count:
            torch.testing.assert_close(values[matrix, -count:], expected[matrix, -count:], rtol=2e-3, atol=0.0)
            inside = vectors[matrix, :, -count:].mH @ basis[matrix, :, -count:]
            assert float(torch.linalg.svdvals(inside).min()) > 0.97


def test_small_matrices_are_decomposed_fully() -> None:
    gram = matrices([5], torch.float32)[:, :60, :60]
    values, _ = leading_components(gram, torch.full((1,), EDGE))
    torch.testing.assert_close(values, torch.linalg.eigvalsh(gram), rtol=1e-4, atol=0.01)
