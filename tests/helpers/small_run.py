"""Settings of a small phantom, and the command line that preprocesses it."""

from __future__ import annotations

from pathlib import Path

from dsiprep.phantom import PhantomSettings

SMALL = PhantomSettings(scheme="hasc55", resolution=5.0, t1w_resolution=2.5, moved=0.2, ideal=False, seed=3)


def command(phantom: Path, out: Path, *extra: str) -> list[str]:
    return [str(phantom / "bids"), str(out), "participant", "--output-resolution", "5", "--sloppy",
            "-w", str(out.parent / "work"), "--device", "cpu", *extra]  # fmt: skip
