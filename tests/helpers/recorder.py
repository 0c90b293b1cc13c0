"""Fake third-party programs that record their command line and produce prepared output files.

They test which arguments and files dsiprep passes to a program and how it uses the output, not the program itself.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

SCRIPT = """#!{python}
import json, os, shutil, sys
folder = {folder!r}
name = os.path.basename(sys.argv[0])
for argument in filter(os.path.isfile, sys.argv[1:]):
    for path in (argument, argument[:-4] + ".bmtxt"):
        if os.path.isfile(path):
            shutil.copy(path, os.path.join(folder, "got-" + os.path.basename(path)))
environment = {{key: os.environ.get(key) for key in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}}
with open(os.path.join(folder, "calls.jsonl"), "a") as stream:
    call = {{"name": name, "arguments": sys.argv[1:], "cwd": os.getcwd(), "environment": environment}}
    stream.write(json.dumps(call) + chr(10))
behaviour = json.load(open(os.path.join(folder, name + ".json")))
print(behaviour["output"])
for target, source in behaviour["files"].items():
    if target.isdigit() or target.startswith("-"):
        if target not in sys.argv:
            continue
        target = sys.argv[sys.argv.index(target) + 1]
    shutil.copy(source, os.path.join(os.getcwd(), target))
sys.exit(behaviour["status"])
"""


class Recorder:
    """Installation folder with fake programs.

    `folder` receives `got-NAME`, a copy of every file that a program was given, and the record of the calls.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)

    def program(
        self, name: str, files: dict[str, Path] | None = None, status: int = 0, output: str = "working ..."
    ) -> None:
        """Install a fake program.

        Parameters
        ----------
        name : str
        files : dict, optional
            Files that the program produces, by their name in its working folder, or by the option ("-t") whose value
            is that name.
        status : int
            Exit status.
        output : str
            Text that the program prints.
        """
        path = self.folder / "bin" / name
        path.write_text(SCRIPT.format(python=sys.executable, folder=str(self.folder)))
        path.chmod(0o755)
        produced = {target: str(source) for target, source in (files or {}).items()}
        behaviour = {"files": produced, "status": status, "output": output}
        (self.folder / f"{name}.json").write_text(json.dumps(behaviour))

    def calls(self) -> list[dict[str, object]]:
        """Name, arguments, working folder and environment of each call, in order."""
        log = self.folder / "calls.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []

    def command_lines(self) -> list[list[str]]:
        """The command lines, with paths reduced to file names."""
        lines = []
        for call in self.calls():
            arguments: list[str] = list(call["arguments"])  # type: ignore[call-overload]
            lines.append([str(call["name"]), *(Path(w).name if os.sep in w else w for w in arguments)])
        return lines
