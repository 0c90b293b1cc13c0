"""`dsiprep-tools array`: a job array for a batch system, without anything that has to keep running."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from dsiprep.errors import OutputError

__all__ = ["add_array_options", "run_array"]


def add_array_options(tool: argparse.ArgumentParser) -> None:
    """Add the options of `dsiprep-tools array`."""
    tool.add_argument("bids_dir", type=Path, help="root of the BIDS dataset")
    tool.add_argument("output_dir", type=Path, help="output folder for the derivatives")
    tool.add_argument("--slurm", action="store_true", required=True, help="for SLURM, the only one at present")
    tool.add_argument("--at-once", type=int, default=0, metavar="N", help="run at most N tasks (default: no limit)")
    tool.add_argument("--command", default=shlex.join([sys.executable, "-m", "dsiprep"]), metavar="TEXT",
                      help="what starts dsiprep in a task, such as 'apptainer run --containall dsiprep.sif' "
                      "(default: this installation)")  # fmt: skip
    tool.add_argument("--options", nargs=argparse.REMAINDER, default=[], metavar="OPTION",
                      help="all that follows goes to dsiprep: --options --output-resolution 2 -w /scratch")  # fmt: skip
    tool.add_argument("-o", "--out", type=Path, default=Path("dsiprep.sbatch"), metavar="FILE",
                      help="script to write (default: dsiprep.sbatch)")  # fmt: skip


def run_array(options: argparse.Namespace) -> int:
    """Write the script; a task has the cores of --omp-nthreads, or 4.

    Raises
    ------
    InputError
        If no subject can be processed.
    OutputError
        If a folder or the script cannot be written.
    SettingsError
        If an option of dsiprep is invalid.
    """
    from dsiprep.cli.app import build_parser, check_folders, find_selected_units, read_settings
    from dsiprep.cli.scheduling import make_jobs
    from dsiprep.schedulers.slurm_array import slurm_array

    folders = [str(options.bids_dir.resolve()), str(options.output_dir.resolve())]
    given = build_parser().parse_args([*folders, "participant", *options.options])
    chosen = read_settings(given)
    check_folders(given)
    given.scheduler = "slurm"
    jobs = make_jobs(find_selected_units(given, chosen)[0], given, chosen, "")
    command = [*shlex.split(options.command), *folders, "participant", *options.options]
    script = slurm_array(jobs, command, options.at_once)
    try:
        (given.output_dir / "logs").mkdir(parents=True, exist_ok=True)  # SLURM does not make the folder of its output
        options.out.write_text(script)
    except OSError as problem:
        raise OutputError(f"{problem.filename}: {problem.strerror}; choose another file with --out") from None
    print(f"{len(jobs)} subjects. Submit with: sbatch {options.out}")
    return 0
