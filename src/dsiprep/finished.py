"""Records of finished subjects in the output folder, so that a run takes up only what is new or has changed.

A record holds what the outputs depend on (source of dsiprep, versions of libraries and engines, settings, metadata, and
the files with their contents) and which files were written. A file whose size and time are those of the record is taken
as unchanged; otherwise its contents decide for an input, and a change is assumed for an output.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from dsiprep.cache import LIBRARIES, plain_text
from dsiprep.data.acquisition import Unit
from dsiprep.engines.selection import engine_fingerprints
from dsiprep.errors import DsiprepError
from dsiprep.io.files import content_digest
from dsiprep.io.templates import choose_template
from dsiprep.io.user_mask import find_mask
from dsiprep.settings import Settings
from dsiprep.sources import package_digest

__all__ = ["FinishedSubjects"]

Stamp = list[int]  # size, time of the last change in ns
Inputs = dict[str, list[Any]]  # stamp and SHA-256 by path


class FinishedSubjects:
    """What was finished in an output folder with given settings.

    Parameters
    ----------
    out : Path
        Folder of the derivatives.
    settings : Settings
    """

    def __init__(self, out: Path, settings: Settings) -> None:
        self.out, self.settings = out, settings

    def warnings_of(self, subject: str, units: Sequence[Unit]) -> dict[str, tuple[str, ...]] | None:
        """The warnings of each unit of a subject that finished with the same inputs; None if it has to be processed."""
        try:
            record = json.loads(self._record(subject).read_text())
            unchanged = (
                record["key"] == self._key(units)
                and _stamps(self.out, _outputs(self.out, subject)) == record["outputs"]
                and self._same_inputs(units, record["inputs"])
            )
            return {name: tuple(texts) for name, texts in record["warnings"].items()} if unchanged else None
        except (OSError, ValueError, KeyError, TypeError, DsiprepError):  # no record, or one that is of no use
            return None

    def begin(self, subject: str, units: Sequence[Unit]) -> Inputs:
        """Remove the record of a subject whose outputs are about to change; the state of its inputs, for `remember`.

        Empty if an input cannot be read, which will end the processing.
        """
        self._record(subject).unlink(missing_ok=True)
        try:
            paths = dict.fromkeys(_inputs(units, self.settings))
            return {str(path): [*_stamp(path), content_digest(path).hex()] for path in paths}
        except (OSError, DsiprepError):
            return {}

    def remember(
        self, subject: str, units: Sequence[Unit], inputs: Inputs, warnings: dict[str, tuple[str, ...]]
    ) -> None:
        """Record that all units of a subject have finished.

        Raises
        ------
        OSError
            If the record cannot be written.
        """
        record = {
            "key": self._key(units),
            "inputs": inputs,
            "outputs": _stamps(self.out, _outputs(self.out, subject)),
            "warnings": warnings,
        }
        path = self._record(subject)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(record, indent=1) + "\n")
        temporary.replace(path)

    def _record(self, subject: str) -> Path:
        return self.out / "logs" / f"sub-{subject}_finished.json"

    def _key(self, units: Sequence[Unit]) -> str:
        return hashlib.sha256(plain_text([_common(self.settings), self.settings, list(units)]).encode()).hexdigest()

    def _same_inputs(self, units: Sequence[Unit], known: Inputs) -> bool:
        paths = list(dict.fromkeys(_inputs(units, self.settings)))
        if [str(path) for path in paths] != list(known):
            return False
        return all(
            _stamp(path) == known[str(path)][:2] or content_digest(path).hex() == known[str(path)][2] for path in paths
        )


@cache
def _common(settings: Settings) -> list[object]:
    """What all subjects depend on besides the settings."""
    anatomy, distortion = settings.anatomy, settings.distortion
    template = choose_template(anatomy.template, anatomy.modality)
    engines = [engine_fingerprints(anatomy), engine_fingerprints(distortion)]
    return [package_digest(), LIBRARIES, engines, template.name, template.note, _stamps(Path("/"), template.files)]


def _inputs(units: Sequence[Unit], settings: Settings) -> Iterable[Path]:
    yield from (Path(given) for given in _named_files(settings) if Path(given).is_file())
    for unit in units:
        yield from unit.files()
        yield from (*unit.t1w, *unit.t2w)
        yield from unit.gre.files() if unit.gre else ()
        mask = find_mask(unit, settings.anatomy) if settings.anatomy.mask else None
        yield from (mask,) if mask else ()


def _named_files(settings: Settings) -> tuple[str, ...]:
    """Options that may name a file."""
    return settings.lattice.grid, settings.report.bounds, settings.nonlinearity.coefficients


def _outputs(out: Path, subject: str) -> list[Path]:
    return sorted(
        [*(path for path in (out / f"sub-{subject}").rglob("*") if path.is_file()), out / f"sub-{subject}.html"]
    )


def _stamps(folder: Path, paths: Iterable[Path]) -> dict[str, Stamp]:
    return {str(path.relative_to(folder)): _stamp(path) for path in paths}


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
