"""Settings of a small phantom, and the command line that preprocesses it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from dsiprep.phantom import PhantomSettings

SMALL = PhantomSettings(scheme="hasc55", resolution=5.0, t1w_resolution=2.5, moved=0.2, ideal=False, seed=3)


def command(phantom: Path, out: Path, *extra: str) -> list[str]:
    return [str(phantom / "bids"), str(out), "participant", "--output-resolution", "5", "--sloppy",
            "-w", str(out.parent / "work"), "--device", "cpu", *extra]  # fmt: skip


def fingerprint(out: Path) -> dict[str, str]:
    """Digests of all images, transforms and tables; reports are excluded because they contain times and dates."""
    suffixes = (".nii.gz", ".tsv", ".bvec", ".bval", ".b", ".txt", ".csv", ".mat", ".h5")
    files = [path for path in out.rglob("*") if path.name.endswith(suffixes) and "logs" not in path.parts]
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
