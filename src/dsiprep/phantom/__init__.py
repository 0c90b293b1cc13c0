"""Simulate a DSI subject with known motion, distortion, eddy currents and noise, as a BIDS dataset."""

from dsiprep.phantom.dataset import make_phantom
from dsiprep.phantom.settings import PhantomSettings, demo_settings

__all__ = ["PhantomSettings", "demo_settings", "make_phantom"]
