"""The BIDS App command line: `dsiprep BIDS_DIR OUTPUT_DIR participant --output-resolution MM`.

Stage options are generated from the settings classes. Options shared with QSIPrep use QSIPrep's names, including its
older spellings; QSIPrep options that dsiprep does not support are rejected with a message that names the alternative.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import logging
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dsiprep import __version__, settings
from dsiprep.cli.config_file import expand_config_file, run_as_toml
from dsiprep.cli.folders import check_folders
from dsiprep.cli.group_level import add_group_options, run_group
from dsiprep.cli.legacy_options import add_legacy_options
from dsiprep.cli.suggestions import suggest_options
from dsiprep.cli.unsupported import UNSUPPORTED_OPTIONS, RejectOption, reject_eddy, take_eddy, value_converter
from dsiprep.errors import DsiprepError, InputError, SettingsError, printable
from dsiprep.io.files import read_json
from dsiprep.report.verdict_bounds import read_bounds

if TYPE_CHECKING:
    from dsiprep.cli.plan_page import PlannedUnit
    from dsiprep.data.acquisition import Unit

log = logging.getLogger("dsiprep")

SETTINGS_GROUPS = {
    "acquisition": settings.AcquisitionSettings,
    "gradients": settings.GradientSettings,
    "nonlinearity": settings.NonlinearitySettings,
    "denoise": settings.DenoiseSettings,
    "unringing": settings.UnringingSettings,
    "motion": settings.MotionSettings,
    "distortion": settings.DistortionSettings,
    "moving_field": settings.MovingFieldSettings,
    "anatomy": settings.AnatomySettings,
    "coregister": settings.CoregisterSettings,
    "resample": settings.ResampleSettings,
    "lattice": settings.LatticeSettings,
    "report": settings.ReportSettings,
}

# Keys allowed in QSIPrep's --shoreline-config file.
SHORELINE_CONFIG_KEYS = ("model", "iters", "transform")
SLOPPY = {"motion.iters": 1, "anatomy.finest_mm": 4.0}  # fastest settings of the default methods


class Parser(argparse.ArgumentParser):
    """Argument parser that reports errors on one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        known = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        self.exit(2, f"dsiprep: {suggest_options(message, known)}\n")


def build_parser() -> Parser:
    """Return the parser of the `dsiprep` command."""
    parser = Parser(
        prog="dsiprep",
        usage="dsiprep BIDS_DIR OUTPUT_DIR {participant,group} --output-resolution MM [options]",
        description="Preprocess diffusion spectrum imaging (DSI) and other diffusion MRI from a BIDS dataset. "
        "Output names follow QSIPrep.",
        allow_abbrev=False,
    )
    parser.add_argument("bids_dir", type=Path, help="root of the BIDS dataset (read only)")
    parser.add_argument("output_dir", type=Path, help="output folder for the derivatives")
    parser.add_argument(
        "analysis_level",
        choices=("participant", "group"),
        help="participant: preprocess each subject; group: compare all subjects that are in the output folder",
    )
    required = parser.add_argument_group("required")
    add_setting(required, "resample", settings.ResampleSettings.__dataclass_fields__["resolution"])
    _add_selection(parser.add_argument_group("input selection"))
    _add_running(parser.add_argument_group("execution"))
    for name, settings_class in SETTINGS_GROUPS.items():
        group = parser.add_argument_group(name.replace("_", " "), (settings_class.__doc__ or "").splitlines()[0])
        for entry in dataclasses.fields(settings_class):
            if entry.metadata.get("flags") and entry.name != "resolution":
                add_setting(group, name, entry)
    add_group_options(parser.add_argument_group("group level", "The page that compares all subjects."))
    add_legacy_options(parser)
    for flag in UNSUPPORTED_OPTIONS:
        parser.add_argument(flag, nargs="?", const=True, action=RejectOption, help=argparse.SUPPRESS)
    return parser


def _add_selection(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--participant-label", "--participant_label", nargs="+", metavar="LABEL",
                       help="subjects to process, with or without sub- (default: all)")  # fmt: skip
    group.add_argument("--session-label", "--session-id", nargs="+", metavar="LABEL",
                       help="sessions to process, with or without ses- (default: all)")  # fmt: skip
    group.add_argument("--bids-filter-file", type=Path, metavar="FILE",
                       help='JSON file of PyBIDS filters: {"dwi": {"acquisition": "dsi"}, "t1w": {...}}')  # fmt: skip
    group.add_argument("--skip-bids-validation", action="store_true",
                       help="do not require dataset_description.json")  # fmt: skip
    group.add_argument("--ignore", nargs="+", default=[], metavar="ITEM",
                       choices=("fieldmaps", "pepolar-dwis", "t2w", "phase", "sdc", "shims", "fov"),
                       help="ignore any of fieldmaps, pepolar-dwis, t2w, phase, sdc, shims, fov")  # fmt: skip
    group.add_argument("--separate-all-dwis", action="store_true", help="process every DWI run into its own output")


def _add_running(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("-w", "--work-dir", type=Path, default=Path("work"), metavar="DIR",
        help="folder for cached stage results, from which an interrupted run resumes; removed on success "
        "(default: ./work)")  # fmt: skip
    add("--keep-work", action="store_true",
        help="keep the work folder (needed by --reports-only and --boilerplate-only)")  # fmt: skip
    add("--device", default="auto", metavar="auto|cpu|cuda|cuda:N",
        help="compute device (default: auto, a GPU if available)")  # fmt: skip
    add("--nprocs", "--nthreads", "--n-cpus", "--n_cpus", type=int, default=os.cpu_count() or 1, metavar="N",
        help="total number of CPU cores (default: all)")  # fmt: skip
    add("--omp-nthreads", type=int, default=0, metavar="N",
        help="CPU cores per subject; if lower than --nprocs, subjects run in parallel (default: --nprocs)")  # fmt: skip
    add("--mem", "--mem-mb", "--mem_mb", type=_megabytes, default=0, metavar="MB",
        help="total memory, which limits the number of subjects that run in parallel (default: no limit)")  # fmt: skip
    add("--config-file", type=Path, metavar="FILE",
        help="logs/dsiprep.toml of an earlier run, whose options are repeated; those given here go first")  # fmt: skip
    add("--scheduler", default="local", metavar="local|ADDRESS|slurm|pbs|sge|lsf|oar",
        help="where subjects run: on this machine, on the workers of a Dask scheduler (tcp://HOST:PORT), or in jobs of "
        "a batch system, one subject per job, with --omp-nthreads cores each (default: local)")  # fmt: skip
    add("--scheduler-options", type=Path, metavar="FILE",
        help="YAML or JSON file with options of the batch system as dask-jobqueue names them (queue, account, "
        "walltime, memory, ...), and minimum_jobs and maximum_jobs")  # fmt: skip
    add("--rerun", action="store_true",
        help="process subjects again that have finished before with the same data, settings and version")  # fmt: skip
    add("--dry-run", action="store_true", help="check all files except voxels, print the plan and exit")
    add("--json", action="store_true", help="with --dry-run: print the plan as JSON")
    add("--validate", action="store_true", help="run bids-validator-deno first and stop if it finds errors")
    add("--anat-only", action="store_true", help="process only the structural images")
    add("--reports-only", action="store_true", help="rebuild the reports from cached results; compute nothing")
    add("--boilerplate-only", action="store_true", help="write the methods text from cached results; compute nothing")
    add("--stop-on-first-crash", action="store_true", help="start no further processing after a failure")
    add(
        "--fs-license-file",
        type=Path,
        metavar="FILE",
        help="FreeSurfer licence, needed by the FreeSurfer engines (default: FS_LICENSE)",
    )
    add("--sloppy", action="store_true", help="fast, low-quality processing for testing only")
    add("-v", "--verbose", action="count", default=0, help="more log messages; -vv for debugging")
    add("--notrack", action="store_true", help="accepted and without effect: dsiprep sends nothing to anyone")
    add("--version", action="version", version=f"dsiprep {__version__}")


def add_setting(group: argparse._ActionsContainer, prefix: str, entry: dataclasses.Field[Any]) -> None:
    """Add the option of a settings field to `group`; if given, its value is stored under `prefix.name`."""
    flags, choices = entry.metadata["flags"], entry.metadata["choices"]
    storage: dict[str, Any] = {"dest": f"{prefix}.{entry.name}" if prefix else entry.name, "default": argparse.SUPPRESS}
    plain = entry.metadata["help"].replace("%", "%%")  # argparse formats help with %
    if isinstance(entry.default, bool):
        storage["action"] = "store_false" if entry.default else "store_true"
        group.add_argument(*flags, help=plain, **storage)
        return
    metavar = entry.metadata["metavar"] or "|".join(str(choice) for choice in choices) or None
    shown = entry.default != "" and not entry.metadata["help"].endswith("(required)")
    suffix = f" (default: {entry.default})" if shown else ""
    group.add_argument(
        *flags,
        type=value_converter(flags[0], type(entry.default), choices),
        metavar=metavar,
        help=plain + suffix,
        **storage,
    )


def _megabytes(text: str) -> int:
    units = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}
    digits = text.rstrip("BbKkMmGgTt")
    unit = text[len(digits) : len(digits) + 1].upper() or "M"
    try:
        return int(float(digits) * units[unit])
    except (ValueError, KeyError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 16000 or 16G") from None


def read_settings(options: argparse.Namespace) -> settings.Settings:
    """Return the settings for the parsed options.

    Raises
    ------
    SettingsError
        If a value is missing or out of range, or if a configuration file cannot be read.
    """
    values: dict[str, Any] = {**(SLOPPY if options.sloppy else {}), **vars(options)}  # given options override --sloppy
    if options.shoreline_config:
        values |= _shoreline_config(options.shoreline_config)
    options.eddy = take_eddy(values)
    parts: dict[str, Any] = {}
    for name, settings_class in SETTINGS_GROUPS.items():
        keys = {field.name: f"{name}.{field.name}" for field in dataclasses.fields(settings_class)}
        parts[name] = settings_class(**{field: values[key] for field, key in keys.items() if key in values})
    if "sdc" in options.ignore:
        parts["distortion"] = dataclasses.replace(parts["distortion"], method="none")
    chosen = settings.Settings(**parts)
    _check_combinations(chosen, options)
    return chosen


def _check_combinations(chosen: settings.Settings, options: argparse.Namespace) -> None:
    if not options.anat_only:
        chosen.resample.require_resolution()
    rules = (
        (chosen.anatomy.modality != "T2w" or "t2w" not in options.ignore,
         "--anat-modality T2w and --ignore t2w are incompatible; remove one of them"),
        (options.nprocs >= 1, f"--nprocs {options.nprocs}: give the number of cores to use, 1 or more"),
        (options.omp_nthreads >= 0, f"--omp-nthreads {options.omp_nthreads}: give the number of cores per subject"),
        (options.mem >= 0, f"--mem {options.mem}: give the total memory in MB"),
        (options.dry_run or not options.json, "--json prints the plan; use it with --dry-run"),
    )  # fmt: skip
    for valid, message in rules:
        if not valid:
            raise SettingsError(message)
    read_bounds(chosen.report.bounds)


def _shoreline_config(path: Path) -> dict[str, Any]:
    """Motion settings from QSIPrep's --shoreline-config file: {"model": ..., "iters": ..., "transform": ...}."""
    content = _read_json("--shoreline-config", path)
    entries = {f.name: f for f in dataclasses.fields(settings.MotionSettings) if f.name in SHORELINE_CONFIG_KEYS}
    unknown = sorted(set(content) - set(entries))
    if unknown:
        raise SettingsError(
            f"--shoreline-config {path}: unknown key: {', '.join(unknown)}; "
            f"allowed keys: {', '.join(SHORELINE_CONFIG_KEYS)}"
        )
    values = {}
    for name, value in content.items():
        entry, text = entries[name], "3dSHORE" if str(value).lower() == "3dshore" else str(value)
        try:
            convert = value_converter(entry.metadata["flags"][0], type(entry.default), entry.metadata["choices"])
            values[f"motion.{name}"] = convert(text)
        except argparse.ArgumentTypeError as error:
            raise SettingsError(f"--shoreline-config {path}: {name}: {error}") from error
    return values


def _read_json(flag: str, path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except InputError as error:
        raise SettingsError(f"{flag}: {error}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0 success, 1 failure, 2 invalid options, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        words = expand_config_file(sys.argv[1:] if arguments is None else arguments)
    except SettingsError as error:
        print(f"dsiprep: {error}", file=sys.stderr)
        return 2
    options = build_parser().parse_args(words)
    logging.basicConfig(level=[logging.WARNING, logging.INFO, logging.DEBUG][min(options.verbose, 2)],
                        format="%(levelname)s: %(message)s")  # fmt: skip
    try:
        if options.analysis_level == "group":
            return run_group(options)
        chosen = read_settings(options)
        check_folders(options)
        if options.fs_license_file:
            os.environ["FS_LICENSE"] = str(options.fs_license_file.resolve())
        with _interrupted_by_sigterm():
            return _run(options, chosen, list(arguments if arguments is not None else sys.argv[1:]))
    except SettingsError as error:
        print(f"dsiprep: {error}", file=sys.stderr)
        return 2
    except DsiprepError as error:
        print(f"dsiprep: {error}", file=sys.stderr)
        return 1
    except Exception as problem:
        print(f"dsiprep: {_report_unexpected(problem)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("dsiprep: interrupted; run the same command again to resume", file=sys.stderr)
        return 130


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM, which schedulers send before they kill, ends the run and its processes as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _report_unexpected(problem: Exception) -> str:
    """Write the traceback of an unexpected error to a log file and return a one-line message."""
    handle, log_file = tempfile.mkstemp(prefix="dsiprep-", suffix=".log")
    with os.fdopen(handle, "w", errors="backslashreplace") as stream:
        stream.write("".join(traceback.format_exception(problem)))
    if isinstance(problem, OSError) and problem.filename is not None:
        return f"{problem.filename}: {problem.strerror}; check the path and permissions, then rerun (log: {log_file})"
    return f"unexpected {type(problem).__name__}: {problem}; please report it and attach {log_file}"


def find_selected_units(options: argparse.Namespace, chosen: settings.Settings) -> tuple[list[Unit], dict[str, str]]:
    """The units of the subjects that the options select, and why some subjects have none, which is printed as well."""
    from dsiprep.io.bids import find_units

    failed: dict[str, DsiprepError] = {}
    units = find_units(
        options.bids_dir.resolve(),
        chosen,
        participants=options.participant_label,
        sessions=options.session_label,
        filters=_read_json("--bids-filter-file", options.bids_filter_file) if options.bids_filter_file else None,
        ignore=frozenset(options.ignore),
        separate_all_dwis=options.separate_all_dwis,
        distortion_group_merge=chosen.resample.merge,
        failed=failed,
    )
    reject_eddy(options.eddy, chosen, units)
    failure_messages = {
        subject: str(error) if f"sub-{subject}" in str(error) else f"sub-{subject}: {error}"
        for subject, error in failed.items()
    }
    for message in failure_messages.values():
        print(f"dsiprep: {message}", file=sys.stderr)
    return units, failure_messages


def _run(options: argparse.Namespace, chosen: settings.Settings, arguments: list[str]) -> int:
    from dsiprep.cli.plan_page import plan_units, validate_dataset
    from dsiprep.cli.progress import run_log
    from dsiprep.cli.scheduling import make_jobs, scheduler_of, side_by_side
    from dsiprep.cli.terminal import run_and_show
    from dsiprep.plan import check_anatomy

    if options.validate:
        validate_dataset(options.bids_dir.resolve())
    units, failure_messages = find_selected_units(options, chosen)
    template = check_anatomy(units, chosen) if units else ""
    command = printable("dsiprep " + " ".join(arguments))
    jobs = make_jobs(units, options, chosen, command)
    if options.dry_run:
        return _show_plan(plan_units(units, chosen, template), failure_messages, options)
    if not units or (failure_messages and options.stop_on_first_crash):
        return 1
    with run_log(options.output_dir.resolve(), run_as_toml(build_parser(), options, chosen, command)):
        return run_and_show(jobs, scheduler_of(jobs, options), failure_messages, side_by_side(jobs, options))


def _show_plan(planned: Sequence[PlannedUnit], failed: dict[str, str], options: argparse.Namespace) -> int:
    """Print the plan and return the exit code: 1 if the run would refuse a subject or a unit."""
    from dsiprep.cli.plan_page import plan_as_json, print_plan

    if options.json:
        print(plan_as_json(planned, failed, options.bids_dir.resolve()))
    else:
        print_plan(planned)
    return 1 if failed or any(plan.problem for plan in planned) else 0


if __name__ == "__main__":
    sys.exit(main())
