"""Location of shared data sets next to a checkout; tests that need them are skipped if they are absent."""

from __future__ import annotations

from pathlib import Path

SHARED = Path(__file__).parents[3] / "shared" / "data"
