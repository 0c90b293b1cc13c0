"""The command line on a small phantom."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsiprep.phantom import PhantomSettings, make_phantom

SMALL = PhantomSettings(scheme="hasc55", resolution=5.0, t1w_resolution=2.5, moved=0.2, ideal=False, seed=3)


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_phantom(tmp_path_factory.mktemp("phantom"), SMALL)


def command(phantom: Path, out: Path, *extra: str) -> list[str]:
    return [str(phantom / "bids"), str(out), "participant", "--output-resolution", "5", "--sloppy",
            "-w", str(out.parent / "work"), "--device", "cpu", *extra]  # fmt: skip
