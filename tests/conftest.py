"""Fixtures shared by all tests."""

from __future__ import annotations

import pytest

from helpers.grids import AXES


@pytest.fixture(params=list(AXES))
def orientation(request: pytest.FixtureRequest) -> str:
    """Each orientation of `helpers.grids.AXES` in turn."""
    return str(request.param)
