"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from helpers.bids_dataset import Dataset
from helpers.grids import AXES


@pytest.fixture(autouse=True)
def no_template_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests use the templates that the installation ships, whether or not there is a network."""
    monkeypatch.setattr("dsiprep.io.templates._server_is_reachable", lambda: False)


@pytest.fixture(params=list(AXES))
def orientation(request: pytest.FixtureRequest) -> str:
    """Each orientation of `helpers.grids.AXES` in turn."""
    return str(request.param)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """A BIDS dataset without images."""
    return Dataset(tmp_path / "bids")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
