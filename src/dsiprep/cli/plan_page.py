"""The plan (`--dry-run`): what the run would do and refuse, for people and, with `--json`, for programs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from dsiprep.costs import expected_memory, expected_minutes
from dsiprep.data.acquisition import PhaseEncoding, SamplingScheme, Unit, UnusedImage
from dsiprep.errors import DsiprepError, InputError, SettingsError, printable
from dsiprep.io.bids import explain, scheme_of
from dsiprep.io.unit_check import check_unit
from dsiprep.plan import choose_lead, not_done, plan_stages, warnings_for
from dsiprep.settings import Settings

VALIDATOR = "bids-validator-deno"
SHOWN_ERRORS = 5
ANSI = re.compile(r"\x1b\[[0-9;]*m")  # colours


@dataclass(frozen=True)
class PlannedUnit:
    """One unit, how it would be processed, and why it would be refused (empty if it would not)."""

    unit: Unit
    scheme: SamplingScheme | None
    stages: dict[str, str]
    warnings: tuple[str, ...]
    not_done: list[str]
    minutes: float
    memory: int
    problem: str = ""


def plan_units(units: Sequence[Unit], settings: Settings, template: str = "") -> list[PlannedUnit]:
    """Check the files of each unit, without their voxels, and plan its processing; `template` is for display."""
    planned = []
    for unit in units:
        problem = ""
        try:
            check_unit(unit, settings)
        except DsiprepError as error:
            problem = str(error)
        scheme = scheme_of(unit, settings.acquisition.b0_threshold)
        stages = plan_stages(unit, scheme, settings, choose_lead(unit, units, settings), template)
        minutes, memory = expected_minutes([unit], settings), expected_memory([unit], settings)
        warnings, left = warnings_for(unit, settings), not_done(unit, settings)
        planned.append(PlannedUnit(unit, scheme, stages, warnings, left, minutes, memory, problem))
    return planned


def print_plan(planned: Sequence[PlannedUnit]) -> None:
    """Print the input files and the planned stages of each unit, then the images that no unit takes."""
    console = Console(highlight=False, soft_wrap=True)
    for plan in planned:
        lines = [explain(plan.unit, plan.scheme), "  Stages:"]
        lines += [f"    {stage:<12} {method}" for stage, method in plan.stages.items()]
        lines.append(f"  Expected: about {plan.minutes:.1f} CPU-minutes and {plan.memory / 1024:.1f} GB of memory")
        lines += [f"  WARNING: {sentence}" for sentence in plan.warnings]
        lines += [f"  Not done: {sentence}" for sentence in plan.not_done]
        lines += [f"  REFUSED: {plan.problem}"] if plan.problem else []
        console.print("\n".join(printable(line) for text in lines for line in text.split("\n")), markup=False)
        console.print()
    print_unused(console, [plan.unit for plan in planned])


def print_unused(console: Console, units: Sequence[Unit]) -> None:
    """Print the images of each subject that no unit takes, and why."""
    by_subject = {unit.subject: unit.left_out for unit in units}
    if any(by_subject.values()):
        console.print("Images that are not used:")
        for image in (image for images in by_subject.values() for image in images):
            console.print(f"  {printable(image.path.name)}: {printable(image.reason)}", markup=False, soft_wrap=True)


def plan_as_json(planned: Sequence[PlannedUnit], failed: Mapping[str, str], bids_dir: Path) -> str:
    """The plan as a JSON object; `failed` holds the errors of subjects whose files cannot be grouped."""
    units = [plan.unit for plan in planned]
    unused = {unit.subject: unit.left_out for unit in units}
    content = {
        "dataset": printable(bids_dir),
        "accepted": not failed and not any(plan.problem for plan in planned),
        "units": [_unit_as_json(plan, bids_dir) for plan in planned],
        "refused_subjects": dict(failed),
        "unused": [_unused_as_json(image, bids_dir) for images in unused.values() for image in images],
    }
    return json.dumps(content, indent=2)


def _unit_as_json(plan: PlannedUnit, root: Path) -> dict[str, Any]:
    unit = plan.unit
    scheme = plan.scheme
    return {
        "name": unit.name,
        "subject": unit.subject,
        "session": unit.session,
        "output": unit.output or unit.name,
        "runs": [
            {
                "image": _relative(run.image, root),
                "bval": _relative(run.bval, root),
                "bvec": _relative(run.bvec, root),
                "complex_part": _relative(run.complex_part, root) if run.complex_part else None,
                **_encoding_as_json(run.pe),
            }
            for run in unit.runs
        ],
        "b0_references": [{"image": _relative(epi.image, root), **_encoding_as_json(epi.pe)} for epi in unit.epis],
        "fieldmap": [_relative(path, root) for path in (unit.gre.files() if unit.gre else ())],
        "T1w": [_relative(path, root) for path in unit.t1w],
        "T2w": [_relative(path, root) for path in unit.t2w],
        "scheme": {"kind": scheme.kind, "description": scheme.description} if scheme else None,
        "stages": plan.stages,
        "warnings": list(plan.warnings),
        "not_done": plan.not_done,
        "expected": {"cpu_minutes": round(plan.minutes, 1), "memory_mb": plan.memory},
        "notes": [printable(note) for note in unit.notes],
        "refused": printable(plan.problem) or None,
    }


def _encoding_as_json(pe: PhaseEncoding | None) -> dict[str, Any]:
    return {"phase_encoding": pe.direction if pe else None, "readout_time": pe.readout_time if pe else None}


def _unused_as_json(image: UnusedImage, root: Path) -> dict[str, str]:
    return {"image": _relative(image.path, root), "reason": printable(image.reason)}


def _relative(path: Path, root: Path) -> str:
    return printable(path.relative_to(root) if path.is_relative_to(root) else path)


def validate_dataset(root: Path) -> None:
    """Run the BIDS validator on a dataset.

    Raises
    ------
    SettingsError
        If it is not installed.
    InputError
        If it finds errors, or fails.
    """
    program = shutil.which(VALIDATOR, path=str(Path(sys.executable).parent)) or shutil.which(VALIDATOR)
    if program is None:
        raise SettingsError(f"--validate: {VALIDATOR} is not installed; run `pip install {VALIDATOR}`, or omit it")
    done = subprocess.run([program, str(root), "--format", "json"], capture_output=True, text=True, errors="replace")
    try:
        issues = json.loads(done.stdout)["issues"]["issues"]
    except (ValueError, KeyError, TypeError):
        told = [line for line in ANSI.sub("", done.stderr).splitlines() if "rror" in line]
        reason = told[0].strip() if told else f"exit code {done.returncode}"
        raise InputError(f"--validate: {VALIDATOR} failed ({reason}); omit the option") from None
    errors = [issue for issue in issues if issue.get("severity") == "error"]
    if errors:
        shown = "; ".join(f"{issue.get('code')} {issue.get('location', '')}" for issue in errors[:SHOWN_ERRORS])
        more = f" and {len(errors) - SHOWN_ERRORS} more" if len(errors) > SHOWN_ERRORS else ""
        raise InputError(
            f"--validate: the dataset is not valid BIDS: {shown}{more}; correct it, or omit the option "
            f"(details: {VALIDATOR} {printable(root)})"
        )
