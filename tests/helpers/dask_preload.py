"""`dask worker --preload` runs this in each worker: subjects are scripted."""

from __future__ import annotations

from dsiprep.schedulers import subject_process
from helpers.scripted_subject import COMMAND

subject_process.COMMAND = COMMAND
