"""Programs that are not here, played by a recorder: it writes down its command line and hands back files made before.

A recorder tests what dsiprep asks of a program and what it makes of its answer, not the program.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

SCRIPT = """#!{python}
import json, os, shutil, sys
here = {folder!r}
name = os.path.basename(sys.argv[0])
for word in filter(os.path.isfile, sys.argv[1:]):
    for path in (word, word[:-4] + ".bmtxt"):
        if os.path.isfile(path):
            shutil.copy(path, os.path.join(here, "got-" + os.path.basename(path)))
seen = {{key: os.environ.get(key) for key in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}}
with open(os.path.join(here, "calls.jsonl"), "a") as stream:
    stream.write(json.dumps({{"name": name, "arguments": sys.argv[1:], "cwd": os.getcwd(), "seen": seen}}) + chr(10))
plan = json.load(open(os.path.join(here, name + ".json")))
print(plan["says"])
for place, source in plan["gives"].items():
    if place.isdigit() or place.startswith("-"):
        if place not in sys.argv:
            continue
        place = sys.argv[sys.argv.index(place) + 1]
    shutil.copy(source, os.path.join(os.getcwd(), place))
sys.exit(plan["status"])
"""


class Recorder:
    """A folder with programs that record.

    `gives` of `program` names files to hand back: under the name they get in the program's working folder, or under
    the option whose value is that name ("-t").
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)

    def program(
        self, name: str, gives: dict[str, Path] | None = None, status: int = 0, says: str = "working ..."
    ) -> None:
        path = self.folder / "bin" / name
        path.write_text(SCRIPT.format(python=sys.executable, folder=str(self.folder)))
        path.chmod(0o755)
        plan = {"gives": {k: str(v) for k, v in (gives or {}).items()}, "status": status, "says": says}
        (self.folder / f"{name}.json").write_text(json.dumps(plan))

    def calls(self) -> list[dict[str, object]]:
        """Name, arguments, working folder and environment of each call, in order."""
        log = self.folder / "calls.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []

    def words(self) -> list[list[str]]:
        """The command lines, with the paths of files reduced to their names."""
        lines = []
        for call in self.calls():
            arguments: list[str] = list(call["arguments"])  # type: ignore[call-overload]
            lines.append([str(call["name"]), *(Path(w).name if os.sep in w else w for w in arguments)])
        return lines
