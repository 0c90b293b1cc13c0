"""Checks of the folders of a run before anything is written."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from dsiprep.errors import OutputError

__all__ = ["check_folders"]


def check_folders(options: argparse.Namespace) -> None:
    """Check that the output and work folders are writable and lie outside the input, before anything is written.

    Raises
    ------
    OutputError
        If the input is not a BIDS dataset, or if a folder is inside the input or cannot be created.
    """
    bids, out, work = (path.resolve() for path in (options.bids_dir, options.output_dir, options.work_dir))
    if not bids.is_dir():
        raise OutputError(f"{options.bids_dir} is not a folder; give the root folder of a BIDS dataset")
    if out == bids:
        raise OutputError("the output folder is the BIDS folder; choose another one, such as its derivatives/dsiprep")
    if out.is_relative_to(bids) and out.relative_to(bids).parts[0] != "derivatives":
        raise OutputError(f"the output folder {out} is inside the BIDS folder; only its derivatives/ may hold outputs")
    if work.is_relative_to(bids):
        raise OutputError(f"the work folder {work} is inside the BIDS folder; choose another with --work-dir")
    _check_writable("output", out)
    _check_writable("work", work)
    if not options.skip_bids_validation and not (bids / "dataset_description.json").is_file():
        raise OutputError(
            f"{bids} has no dataset_description.json, so it is not the root of a BIDS dataset; "
            "correct the path, or use --skip-bids-validation"
        )


def _check_writable(name: str, folder: Path) -> None:
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        reason = "is not writable" if nearest.is_dir() else "is a file"
        raise OutputError(f"the {name} folder {folder} cannot be created: {nearest} {reason}; choose another folder")
