"""Fixtures of the report tests."""

from __future__ import annotations

import pytest

from dsiprep.data.results import UnitResults
from helpers.report_subject import make_subject


@pytest.fixture(scope="session")
def subject() -> UnitResults:
    """Results of a simulated subject with two blips and a structural image."""
    return make_subject()
