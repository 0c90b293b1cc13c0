"""The BIDS App command line: `dsiprep BIDS_DIR OUTPUT_DIR participant --output-resolution MM`.

Options of stages are drawn from the settings; names are QSIPrep's wherever both have the thing, and its older names
are taken too. What dsiprep does not have is refused with a sentence.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dsiprep import __version__, settings
from dsiprep.cli.unsupported import NOT_BUILT, NOT_HERE, Refuse, refuse_shell_tools, value_of
from dsiprep.errors import DsiprepError, OutputError, SettingsError

if TYPE_CHECKING:
    from dsiprep.data.acquisition import Unit
    from dsiprep.jobs import Job

log = logging.getLogger("dsiprep")

GROUPS = {
    "acquisition": settings.AcquisitionSettings,
    "denoise": settings.DenoiseSettings,
    "motion": settings.MotionSettings,
    "distortion": settings.DistortionSettings,
    "anatomy": settings.AnatomySettings,
    "coregister": settings.CoregisterSettings,
    "resample": settings.ResampleSettings,
}

# What QSIPrep's --shoreline-config may hold.
SHORELINE_CONFIG = ("model", "iters", "transform")
SLOPPY = {"motion.iters": 1, "anatomy.finest_mm": 4.0}  # the cheapest settings of the same methods


class Parser(argparse.ArgumentParser):
    """argparse, with errors as one sentence and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Print the sentence and leave."""
        self.exit(2, f"dsiprep: {message}\n")


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(
        prog="dsiprep",
        description="Preprocess diffusion spectrum imaging, and any other q-space sampling, from BIDS to "
        "derivatives with QSIPrep's names.",
        allow_abbrev=False,
    )
    parser.add_argument("bids_dir", type=Path, help="root of the BIDS dataset; never written to")
    parser.add_argument("output_dir", type=Path, help="root of the derivatives")
    parser.add_argument("analysis_level", choices=("participant",), help="there is only this level")
    _add_selection(parser.add_argument_group("which data"))
    _add_running(parser.add_argument_group("how to run"))
    for name, kind in GROUPS.items():
        group = parser.add_argument_group(name, (kind.__doc__ or "").splitlines()[0])
        for entry in dataclasses.fields(kind):
            if entry.metadata.get("flags"):
                add_setting(group, name, entry)
    _add_old_names(parser)
    for flag in NOT_HERE:
        parser.add_argument(flag, nargs="?", const=True, action=Refuse, help=argparse.SUPPRESS)
    return parser


def _add_selection(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--participant-label", "--participant_label", nargs="+", metavar="LABEL",
                       help="subjects, with or without sub-")  # fmt: skip
    group.add_argument("--session-label", "--session-id", nargs="+", metavar="LABEL",
                       help="sessions, with or without ses-")  # fmt: skip
    group.add_argument("--bids-filter-file", type=Path, metavar="FILE",
                       help='JSON of PyBIDS entities: {"dwi": {"acquisition": "dsi"}, "t1w": {...}}')  # fmt: skip
    group.add_argument("--skip-bids-validation", action="store_true",
                       help="do not look for dataset_description.json")  # fmt: skip
    group.add_argument("--ignore", nargs="+", default=[], metavar="WHAT",
                       choices=("fieldmaps", "pepolar-dwis", "t2w", "phase", "sdc", "shims", "fov"),
                       help="fieldmaps, pepolar-dwis, t2w, phase, sdc, shims, fov: leave these aside")  # fmt: skip
    group.add_argument("--separate-all-dwis", action="store_true", help="every DWI run becomes its own output")


def _add_running(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("-w", "--work-dir", type=Path, default=Path("work"), metavar="DIR",
        help="results of stages, from which a second try goes on; removed when done (default: ./work)")  # fmt: skip
    add("--keep-work", action="store_true", help="keep the work folder; --reports-only needs it")
    add("--device", default="auto", metavar="auto|cpu|cuda|cuda:N", help="where to compute (default: a GPU if any)")
    add("--nprocs", "--nthreads", "--n-cpus", type=int, default=os.cpu_count() or 1, metavar="N",
        help="cores in all (default: all)")  # fmt: skip
    add("--omp-nthreads", type=int, default=0, metavar="N",
        help="cores per subject; subjects run side by side when it is below --nprocs")  # fmt: skip
    add("--mem", "--mem-mb", type=_megabytes, default=0, metavar="MB",
        help="memory in all, limits how many subjects run at once")  # fmt: skip
    add("--dry-run", action="store_true", help="say what would be done with which files, and stop")
    add("--anat-only", action="store_true", help="only the structural image")
    add("--reports-only", action="store_true", help="draw reports again from kept work, compute nothing")
    add("--boilerplate-only", action="store_true", help="write the methods text for kept work, compute nothing")
    add("--stop-on-first-crash", action="store_true", help="start nothing more after a failure")
    add("--fs-license-file", type=Path, metavar="FILE", help="FreeSurfer's licence, for its engines (or FS_LICENSE)")
    add("--sloppy", action="store_true", help="low quality, for tests of the machinery only")
    add("-v", "--verbose", action="count", default=0, help="say more; -vv says all")
    add("--version", action="version", version=f"dsiprep {__version__}")


def add_setting(group: argparse._ActionsContainer, prefix: str, entry: dataclasses.Field[Any]) -> None:
    """One option drawn from a settings field; its value lands under `prefix.name`, and nothing if it is not given."""
    flags, choices = entry.metadata["flags"], entry.metadata["choices"]
    place: dict[str, Any] = {"dest": f"{prefix}.{entry.name}" if prefix else entry.name, "default": argparse.SUPPRESS}
    if isinstance(entry.default, bool):
        place["action"] = "store_false" if entry.default else "store_true"
        group.add_argument(*flags, help=entry.metadata["help"], **place)
        return
    kind = type(entry.default)
    shown = entry.metadata["metavar"] or "|".join(str(choice) for choice in choices) or None
    suffix = "" if entry.metadata["help"].endswith("(required)") else f" (default: {entry.default})"
    group.add_argument(
        *flags, type=value_of(flags[0], kind, choices), metavar=shown, help=entry.metadata["help"] + suffix, **place
    )


def _add_old_names(parser: Parser) -> None:
    hidden: dict[str, Any] = {"help": argparse.SUPPRESS, "default": argparse.SUPPRESS}
    parser.add_argument("--pepolar-method", dest="distortion.method", type=_pepolar, **hidden)
    parser.add_argument("--b0-to-anat-transform", dest="coregister.dof", type=_old_dof, **hidden)
    parser.add_argument("--b1-biascorrect-stage", dest="denoise.biascorrect", type=_old_bias, **hidden)
    parser.add_argument("--shoreline-config", type=Path, metavar="JSON", help=argparse.SUPPRESS)


def _pepolar(text: str) -> str:
    return str(value_of("--sdc-method", str, ("drbuddi",))(text.lower()))


def _old_dof(text: str) -> int:
    if text not in ("Rigid", "Affine"):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of Rigid, Affine")
    return 6 if text == "Rigid" else 12


def _old_bias(text: str) -> str:
    if ("--b1-biascorrect-stage", text) in NOT_BUILT:
        raise argparse.ArgumentTypeError(NOT_BUILT["--b1-biascorrect-stage", text])
    if text not in ("final", "none"):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of final, none")
    return "n4" if text == "final" else "none"


def _megabytes(text: str) -> int:
    units = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}
    digits = text.rstrip("BbKkMmGgTt")
    letter = text[len(digits) : len(digits) + 1].upper() or "M"
    try:
        return int(float(digits) * units[letter])
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 16000 or 16G") from None


def read_settings(options: argparse.Namespace) -> settings.Settings:
    """The settings that the options ask for.

    Raises
    ------
    SettingsError
        If values are missing, out of range, or a configuration file cannot be read.
    """
    values: dict[str, Any] = {**(SLOPPY if options.sloppy else {}), **vars(options)}  # what was said comes last
    if options.shoreline_config:
        values |= _shoreline_config(options.shoreline_config)
    parts: dict[str, Any] = {}
    for name, kind in GROUPS.items():
        parts[name] = kind(**{f.name: values[f"{name}.{f.name}"] for f in dataclasses.fields(kind)
                              if f"{name}.{f.name}" in values})  # fmt: skip
    if "sdc" in options.ignore:
        parts["distortion"] = dataclasses.replace(parts["distortion"], method="none")
    chosen = settings.Settings(**parts)
    _check_ranges(chosen, options)
    return chosen


def _check_ranges(chosen: settings.Settings, options: argparse.Namespace) -> None:
    resolution = chosen.resample.resolution
    if not resolution and not options.anat_only:
        raise SettingsError("--output-resolution is missing: give the voxel size of the output in mm, such as 2")
    if resolution and not 0.5 <= resolution <= 10:
        raise SettingsError(f"--output-resolution {resolution:g} mm is outside 0.5 to 10 mm")
    motion, window, threshold = chosen.motion, chosen.denoise.window, chosen.acquisition.b0_threshold
    rules = (
        (motion.iters >= 1, "--shoreline-iters must be at least 1; --hmc-method none switches motion correction off"),
        (motion.tolerance > 0, f"--hmc-tolerance {motion.tolerance:g} mm is no length; give one above 0"),
        (window == 0 or (window > 0 and window % 2 == 1),
         f"--dwidenoise-window {window} is even or negative; take an odd number of voxels"),
        (threshold >= 0, f"--b0-threshold {threshold:g} is negative; give the largest b-value that counts as b=0"),
        (chosen.anatomy.modality != "T2w" or "t2w" not in options.ignore,
         "--anat-modality T2w and --ignore t2w contradict each other; leave one of them out"),
        (options.nprocs >= 1, f"--nprocs {options.nprocs}: give the number of cores to use, 1 or more"),
        (options.omp_nthreads >= 0, f"--omp-nthreads {options.omp_nthreads}: give the number of cores per subject"),
        (options.mem >= 0, f"--mem {options.mem}: give the memory to use in MB"),
    )  # fmt: skip
    for fine, sentence in rules:
        if not fine:
            raise SettingsError(sentence)


def _shoreline_config(path: Path) -> dict[str, Any]:
    """QSIPrep's --shoreline-config: {"model": ..., "iters": ..., "transform": ...}."""
    content = _read_json("--shoreline-config", path)
    entries = {f.name: f for f in dataclasses.fields(settings.MotionSettings) if f.name in SHORELINE_CONFIG}
    unknown = sorted(set(content) - set(entries))
    if unknown:
        raise SettingsError(
            f"--shoreline-config {path}: no such entry: {', '.join(unknown)}; there are {', '.join(SHORELINE_CONFIG)}"
        )
    values = {}
    for name, value in content.items():
        entry, text = entries[name], "3dSHORE" if str(value).lower() == "3dshore" else str(value)
        try:
            convert = value_of(entry.metadata["flags"][0], type(entry.default), entry.metadata["choices"])
            values[f"motion.{name}"] = convert(text)
        except argparse.ArgumentTypeError as error:
            raise SettingsError(f"--shoreline-config {path}: {name}: {error}") from error
    return values


def _read_json(flag: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SettingsError(f"{flag} {path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{flag} {path} holds a {type(content).__name__}; a JSON object, {{...}}, is wanted")
    return content


def check_folders(options: argparse.Namespace) -> None:
    """Refuse outputs and work inside the input, before anything is written.

    Raises
    ------
    OutputError
        If a folder is in the wrong place.
    """
    bids, out, work = (path.resolve() for path in (options.bids_dir, options.output_dir, options.work_dir))
    if not bids.is_dir():
        raise OutputError(f"{options.bids_dir} is not a folder; give the root of a BIDS dataset")
    if out == bids:
        raise OutputError("the output folder is the BIDS folder; choose another, such as derivatives/dsiprep beside it")
    if out.is_relative_to(bids) and out.relative_to(bids).parts[0] != "derivatives":
        raise OutputError(f"the output folder {out} is inside the BIDS folder; only its derivatives/ may hold outputs")
    if work.is_relative_to(bids):
        raise OutputError(f"the work folder {work} is inside the BIDS folder; choose another with --work-dir")
    for name, folder in () if options.dry_run else (("output", out), ("work", work)):
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            found = "cannot be written" if nearest.is_dir() else "is a file"
            raise OutputError(f"the {name} folder {folder} cannot be made: {nearest} {found}; choose another")
    if not options.skip_bids_validation and not (bids / "dataset_description.json").is_file():
        raise OutputError(
            f"{bids} has no dataset_description.json, so it is not the root of a BIDS dataset; "
            "correct the path, or run with --skip-bids-validation"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0 all well, 1 something failed, 2 wrong options)."""
    options = build_parser().parse_args(arguments)
    logging.basicConfig(level=[logging.WARNING, logging.INFO, logging.DEBUG][min(options.verbose, 2)],
                        format="%(levelname)s: %(message)s")  # fmt: skip
    try:
        chosen = read_settings(options)
        check_folders(options)
        if options.fs_license_file:
            os.environ["FS_LICENSE"] = str(options.fs_license_file.resolve())
        return _run(options, chosen, list(arguments if arguments is not None else sys.argv[1:]))
    except SettingsError as error:
        print(f"dsiprep: {error}", file=sys.stderr)
        return 2
    except DsiprepError as error:
        print(f"dsiprep: {error}", file=sys.stderr)
        return 1
    except Exception as problem:
        print(f"dsiprep: {_unexpected(problem)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("dsiprep: stopped; the same command goes on from here", file=sys.stderr)
        return 130


def _unexpected(problem: Exception) -> str:
    """A sentence about what nobody foresaw; the traceback goes to a file."""
    handle, where = tempfile.mkstemp(prefix="dsiprep-", suffix=".log")
    with os.fdopen(handle, "w") as stream:
        stream.write("".join(traceback.format_exception(problem)))
    if isinstance(problem, OSError) and problem.filename is not None:
        return f"{problem.filename}: {problem.strerror}; correct the rights or the path, then run again (log: {where})"
    return f"unexpected {type(problem).__name__}: {problem}; please report it with {where}"


def _run(options: argparse.Namespace, chosen: settings.Settings, words: list[str]) -> int:
    from dsiprep.cli.terminal import print_plan, run_and_show
    from dsiprep.io.bids import find_units
    from dsiprep.plan import check_anatomy

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
    refuse_shell_tools(chosen, units)
    told = {s: str(e) if f"sub-{s}" in str(e) else f"sub-{s}: {e}" for s, e in failed.items()}
    for sentence in told.values():
        print(f"dsiprep: {sentence}", file=sys.stderr)
    if options.dry_run:
        print_plan(units, chosen)
        return 1 if failed else 0
    if not units or (failed and options.stop_on_first_crash):
        return 1
    check_anatomy(units, chosen)
    jobs = _jobs(units, options, chosen, "dsiprep " + " ".join(words))
    processes = _processes(options, jobs)
    return run_and_show(jobs, processes, options.stop_on_first_crash, told)


def _jobs(units: Sequence[Unit], options: argparse.Namespace, chosen: settings.Settings, command: str) -> list[Job]:
    from dsiprep.device import choose
    from dsiprep.engines.selection import check_engines
    from dsiprep.jobs import Job

    device = choose(options.device)  # a wrong name is found out before anything starts
    mode = next((m for m in ("anat_only", "reports_only", "boilerplate_only") if getattr(options, m)), "")
    by_subject: dict[str, list[Unit]] = {}
    for unit in units:
        if mode in ("", "anat_only"):
            check_engines(unit, chosen, device)
        by_subject.setdefault(unit.subject, []).append(unit)
    threads = options.omp_nthreads or options.nprocs
    return [
        Job(subject, tuple(its), chosen, options.output_dir.resolve(), options.work_dir.resolve(), options.device,
            threads, options.keep_work, mode, command)
        for subject, its in by_subject.items()
    ]  # fmt: skip


def _processes(options: argparse.Namespace, jobs: list[Job]) -> int:
    """How many subjects at once: what cores and memory allow."""
    from dsiprep.jobs import memory_needed

    processes = max(1, options.nprocs // (options.omp_nthreads or options.nprocs))
    if options.mem:
        processes = min(processes, max(1, options.mem // max(memory_needed(job) for job in jobs)))
    return min(processes, len(jobs))


if __name__ == "__main__":
    sys.exit(main())
