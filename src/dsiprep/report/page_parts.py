"""The elements of a report page, and the writer that stores its figures."""

from __future__ import annotations

import io
import os
import re
import struct
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image


@dataclass(frozen=True)
class Frame:
    """One image file of a figure: its label, its link relative to the page, and its size in CSS pixels."""

    label: str
    href: str
    width: int
    height: int


@dataclass(frozen=True)
class Picture:
    """A figure of one frame, or of several equally sized frames that the reader can switch between.

    `caption` describes the figure, `alt` is the text alternative, and `hint` states what to look for. `name` is that of
    its files, by which the page links to it; `folded` figures are shown on demand.
    """

    frames: tuple[Frame, ...]
    alt: str
    caption: str
    hint: str = ""
    name: str = ""
    folded: bool = False

    @property
    def has_several_frames(self) -> bool:
        """Whether there is more than one frame."""
        return len(self.frames) > 1


@dataclass(frozen=True)
class Fact:
    """A named value with an optional explanation."""

    name: str
    value: str
    meaning: str = ""


@dataclass(frozen=True)
class Section:
    """One section of the page.

    `lead` is the introductory paragraph; `notes` are shown directly below it; `shares` are the segments of a
    stacked bar (label, value); `tables` are (caption, header, rows); `interactive` holds the q-space samples, as JSON,
    for the script of the page.
    """

    key: str
    title: str
    lead: str
    pictures: tuple[Picture, ...] = ()
    facts: tuple[Fact, ...] = ()
    notes: tuple[str, ...] = ()
    shares: tuple[tuple[str, float], ...] = ()
    tables: tuple[tuple[str, tuple[str, ...], tuple[tuple[str, ...], ...]], ...] = ()
    interactive: str = ""


def write_atomically(path: Path, content: bytes) -> Path:
    """Write to a temporary file, then rename it, so that readers see either the old or the complete new file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        Path(name).chmod(0o666 & ~_umask())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _image_size(content: bytes) -> tuple[int, int]:
    """Width and height of a PNG, WebP or SVG in CSS pixels."""
    if content.startswith(b"RIFF"):
        with Image.open(io.BytesIO(content)) as picture:
            return picture.size
    if content.startswith(b"\x89PNG"):
        width, height = struct.unpack(">II", content[16:24])
        return int(width), int(height)
    box = re.search(rb'viewBox="0 0 ([\d.]+) ([\d.]+)"', content[:4000])
    return (round(float(box[1]) * 4 / 3), round(float(box[2]) * 4 / 3)) if box else (1000, 500)


@dataclass
class FigureWriter:
    """Writes figures to `out/sub-X/figures` under BIDS-like names and keeps track of them.

    Attributes
    ----------
    out : Path
        Folder of the page; links are relative to it.
    subject : str
        "sub-01".
    prefix : str
        Name of the unit; files are named `<prefix>_desc-<name>_dwi.<png|webp|svg>`.
    written : list of str
        Names of the files written so far.
    """

    out: Path
    subject: str
    prefix: str
    written: list[str] = field(default_factory=list)

    def write(self, name: str, content: bytes, label: str = "") -> Frame:
        """Write one image; `name` consists of letters and digits only."""
        suffix = "png" if content.startswith(b"\x89PNG") else "webp" if content.startswith(b"RIFF") else "svg"
        file = f"{self.prefix}_desc-{name}_dwi.{suffix}"
        write_atomically(self.out / self.subject / "figures" / file, content)
        self.written.append(file)
        return Frame(label, f"{self.subject}/figures/{file}", *_image_size(content))

    def single(
        self, name: str, content: bytes | None, alt: str, caption: str, hint: str = "", folded: bool = False
    ) -> tuple[Picture, ...]:
        """A figure of one frame; an empty tuple where `content` is None."""
        return () if content is None else (Picture((self.write(name, content),), alt, caption, hint, name, folded),)

    def multiple(
        self, name: str, frames: list[tuple[str, bytes]], alt: str, caption: str, hint: str = ""
    ) -> tuple[Picture, ...]:
        """A figure of several frames (label, content); the label is appended to the file name."""
        written = tuple(
            self.write(name + re.sub(r"[^A-Za-z0-9]", "", label.title()), content, label) for label, content in frames
        )
        return (Picture(written, alt, caption, hint, name),)

    def remove_stale(self) -> None:
        """Delete figures of this unit that an earlier run wrote and this run did not."""
        for path in (self.out / self.subject / "figures").glob(f"{self.prefix}_desc-*_dwi.*"):
            if path.name not in self.written:
                path.unlink(missing_ok=True)
