"""Fixtures for all tests."""

from __future__ import annotations

import pytest

from helpers.grids import AXES


@pytest.fixture(params=list(AXES))
def orientation(request: pytest.FixtureRequest) -> str:
    """Each orientation in turn."""
    return str(request.param)
