"""Write docs/options.md from the command line itself: `python docs/make_options.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

from dsiprep.cli import app as cli
from dsiprep.cli.tools import build_parser as build_tools
from dsiprep.cli.unsupported import NOT_BUILT, NOT_HERE
from dsiprep.phantom.settings import PhantomSettings

HEAD = """\
# Options

Drawn from the settings by `python docs/make_options.py`; do not edit by hand.

    dsiprep BIDS_DIR OUTPUT_DIR participant --output-resolution MM [options]

Names are QSIPrep's wherever both programs have the thing. Older names of QSIPrep are taken too:
`--hmc-model`, `--shoreline-iters`, `--hmc-transform`, `--pepolar-method`, `--b0-to-anat-transform`,
`--shoreline-config`, `--b1-biascorrect-stage`, `--dwi-denoise-window`, `--participant_label`, `--session-id`.
"""


def page() -> str:
    """The whole page as Markdown."""
    lines = [HEAD]
    for group in cli.build_parser()._action_groups:
        actions = [a for a in group._group_actions if a.option_strings and a.help != argparse.SUPPRESS]
        if actions and group.title not in ("options",):
            lines += [f"## {(group.title or '').capitalize()}", "", group.description or "", ""]
            lines += _rows(actions)
    lines += ["## Refused, with what to do instead", "", "| option of QSIPrep | what dsiprep says |", "|---|---|"]
    lines += [f"| `{flag}` | {reason} |" for flag, reason in NOT_HERE.items()]
    lines += [f"| `{flag} {value}` | {reason} |" for (flag, value), reason in NOT_BUILT.items()]
    phantom = next(
        a for a in build_tools()._actions if isinstance(a, argparse._SubParsersAction)
    ).choices["phantom"]  # fmt: skip
    lines += ["", "## dsiprep-tools phantom OUT", "", (PhantomSettings.__doc__ or "").splitlines()[0], ""]
    lines += _rows([a for a in phantom._actions if a.option_strings and a.dest != "help"])
    return "\n".join(lines) + "\n"


def _rows(actions: list[argparse.Action]) -> list[str]:
    rows = ["| option | meaning |", "|---|---|"]
    for action in actions:
        names = ", ".join(f"`{name}`" for name in action.option_strings)
        value = f" `{action.metavar}`" if isinstance(action.metavar, str) else ""
        text = (action.help or "").replace("|", r"\|").replace("%%", "%")
        rows.append(f"| {names}{value.replace('|', chr(92) + '|')} | {text} |")
    return [*rows, ""]


if __name__ == "__main__":
    (Path(__file__).parent / "options.md").write_text(page())
