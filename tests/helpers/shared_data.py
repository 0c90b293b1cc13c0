"""Where people's data lie beside a checkout; tests that need them are skipped where they are absent."""

from __future__ import annotations

from pathlib import Path

SHARED = Path(__file__).parents[3] / "shared" / "data"
