"""Find and read the sidecars and b-tables that apply to an image, by the inheritance principle of BIDS.

A file applies to an image if it has the same suffix and only entities that the image has, too. Files in deeper folders
override those above. In one folder, the file named exactly like the image stands alone, as in the BIDS validator;
otherwise, of several files whose entities contain each other, those with more entities override the others.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from dsiprep.errors import MetadataError
from dsiprep.io.bids_filters import entities
from dsiprep.io.files import file_state, read_json

EXTENSIONS = (".json", ".bval", ".bvec")


class SidecarFiles:
    """Sidecars and b-tables of the images of a dataset; folders and sidecars are read once."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._folders: dict[Path, list[tuple[str, dict[str, str]]]] = {}
        self._contents: dict[Path, dict[str, Any]] = {}

    def find(self, image: str, extension: str) -> list[Path]:
        """Files with this extension that apply to an image, the most specific one last.

        Raises
        ------
        MetadataError
            If two files in one folder apply and neither is more specific.
        """
        path = Path(image)
        wanted = entities(path)
        levels = [folder for folder in reversed(path.parents) if folder == self.root or self.root in folder.parents]
        return [found for level in levels for found in self._in_folder(level, path, wanted, extension)]

    def metadata(self, image: str) -> dict[str, Any]:
        """Fields of all sidecars that apply to an image. Raises a MetadataError as `find` and `read_json`."""
        fields: dict[str, Any] = {}
        for path in self.find(image, ".json"):
            if path not in self._contents:
                self._contents[path] = read_json(path)
            fields |= self._contents[path]
        return fields

    def table(self, image: str, extension: str) -> Path | None:
        """The `.bval` or `.bvec` file that applies to an image, or None. Raises as `find`."""
        found = self.find(image, extension)
        return found[-1] if found else None

    def _in_folder(self, folder: Path, image: Path, wanted: dict[str, str], extension: str) -> list[Path]:
        matches = [
            (name, values)
            for name, values in self._listing(folder)
            if name.endswith(extension) and all(wanted.get(key) == value for key, value in values.items())
        ]
        exact = [folder / name for name, values in matches if values == wanted]
        if exact:
            return exact[:1]
        matches.sort(key=lambda match: len(match[1]))
        for (general, few), (specific, more) in pairwise(matches):
            if not few.items() <= more.items() or few == more:
                raise MetadataError(
                    f"{image}: both {general} and {specific} in {folder} apply to it and neither "
                    "is more specific; rename one after the image, or merge them"
                )
        return [folder / name for name, _ in matches]

    def _listing(self, folder: Path) -> list[tuple[str, dict[str, str]]]:
        """Names with one of `EXTENSIONS`, dangling links included, and their entities with the suffix."""
        if folder not in self._folders:
            try:
                self._folders[folder] = _list_sidecars(folder, file_state(folder))
            except OSError:
                self._folders[folder] = []
        return self._folders[folder]


@lru_cache(maxsize=256)
def _list_sidecars(folder: Path, state: object) -> list[tuple[str, dict[str, str]]]:
    """Of a folder in this state: that of the root of a dataset is asked for by every subject."""
    everything = (path.name for path in folder.iterdir())
    names = sorted(name for name in everything if name.endswith(EXTENSIONS) and not name.startswith("."))
    return [(name, values) for name in names if (values := entities(name)).get("suffix")]
