"""The group level of the command line: `dsiprep BIDS_DIR OUTPUT_DIR group`."""

from __future__ import annotations

import argparse
from pathlib import Path

from dsiprep import __version__
from dsiprep.errors import OutputError

__all__ = ["add_group_options", "run_group"]


def add_group_options(group: argparse._ArgumentGroup) -> None:
    """Add the options that apply to the group level alone."""
    group.add_argument(
        "--reference-table",
        type=Path,
        metavar="FILE",
        help="table with one row per series to compare with, such as the group_dwi.tsv of another study (default: the "
        "cohort itself)",
    )
    group.add_argument(
        "--ratings",
        type=Path,
        metavar="FILE",
        help="CSV file of ratings saved from the page (default: group_ratings.csv in the output folder, if it exists)",
    )


def run_group(options: argparse.Namespace) -> int:
    """Write the cohort page of an output folder and return the exit code.

    Raises
    ------
    OutputError
        If there is no such folder.
    InputError
        If there are no series in it, or a table cannot be read.
    """
    from dsiprep.report.group_page import write_group

    out: Path = options.output_dir
    if not out.is_dir():
        raise OutputError(f"{out} is not a folder; run the participant level first")
    page = write_group(out, __version__, options.reference_table, options.ratings)
    print(f"Cohort: {page}")
    return 0
