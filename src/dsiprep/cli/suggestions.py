"""Suggestions for options that do not exist."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["suggest_options"]

UNRECOGNIZED = "unrecognized arguments: "  # as argparse puts it


def suggest_options(message: str, known: Iterable[str]) -> str:
    """An error message of argparse, with the options that an unknown one resembles.

    Parameters
    ----------
    message : str
    known : iterable of str
        All options of the parser.
    """
    if not message.startswith(UNRECOGNIZED):
        return message
    names = list(known)
    unknown = [word.split("=")[0] for word in message.removeprefix(UNRECOGNIZED).split() if word.startswith("-")]
    if not unknown:
        return f"{message}; options begin with --, see dsiprep --help"
    parts = []
    for word in unknown:
        close = get_close_matches(word.replace("_", "-"), names, n=2, cutoff=0.72)
        close = close or [name for name in names if len(word) > 5 and name.startswith(word)][:2]
        parts.append(f"there is no option {word}" + (f"; did you mean {' or '.join(close)}?" if close else ""))
    return "; ".join(parts) + ("" if parts[-1].endswith("?") else "; see dsiprep --help")
