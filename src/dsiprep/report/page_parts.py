"""The pieces a page is made of, and the folder its pictures go to."""

from __future__ import annotations

import os
import re
import struct
import tempfile
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Frame:
    """One image file of a picture: its name for people, where it is from the page, and its size in pixels."""

    label: str
    href: str
    width: int
    height: int


@dataclass(frozen=True)
class Picture:
    """One frame, or several of one size that are shown in turn.

    `caption` says what is shown; `alt` says it to those who do not see it; `hint` says what to look for.
    """

    frames: tuple[Frame, ...]
    alt: str
    caption: str
    hint: str = ""

    @property
    def turns(self) -> bool:
        """Whether there is more than one frame."""
        return len(self.frames) > 1


@dataclass(frozen=True)
class Fact:
    """A number with its name and its meaning in plain words."""

    name: str
    value: str
    meaning: str = ""


@dataclass(frozen=True)
class Section:
    """One card of the page.

    `lead` says what is seen and what to look for; `notes` are shown before everything else; `shares` are
    lengths of a bar (label, value); `tables` are (caption, header, rows).
    """

    key: str
    title: str
    lead: str
    pictures: tuple[Picture, ...] = ()
    facts: tuple[Fact, ...] = ()
    notes: tuple[str, ...] = ()
    shares: tuple[tuple[str, float], ...] = ()
    tables: tuple[tuple[str, tuple[str, ...], tuple[tuple[str, ...], ...]], ...] = ()


def write_atomically(path: Path, content: bytes) -> Path:
    """Write beside, then rename: whoever looks sees the old file or the whole new one."""
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
    """The process's umask; it can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _size(content: bytes) -> tuple[int, int]:
    """Width and height in CSS pixels of a PNG or an SVG."""
    if content.startswith(b"\x89PNG"):
        width, height = struct.unpack(">II", content[16:24])
        return int(width), int(height)
    found = re.search(rb'viewBox="0 0 ([\d.]+) ([\d.]+)"', content[:4000])
    return (round(float(found[1]) * 4 / 3), round(float(found[2]) * 4 / 3)) if found else (1000, 500)


@dataclass
class Album:
    """Writes pictures to `out/sub-X/figures` under BIDS-like names and remembers which ones.

    Attributes
    ----------
    out : Path
        The folder of the page; links are relative to it.
    subject : str
        "sub-01".
    prefix : str
        Name of the unit: pictures are called `<prefix>_desc-<what>_dwi.<png|svg>`.
    """

    out: Path
    subject: str
    prefix: str
    written: list[str] = field(default_factory=list)

    def add(self, what: str, content: bytes, label: str = "") -> Frame:
        """Write one image; `what` is letters and digits only."""
        kind = "png" if content.startswith(b"\x89PNG") else "svg"
        name = f"{self.prefix}_desc-{what}_dwi.{kind}"
        write_atomically(self.out / self.subject / "figures" / name, content)
        self.written.append(name)
        return Frame(label, f"{self.subject}/figures/{name}", *_size(content))

    def still(self, what: str, content: bytes | None, alt: str, caption: str, hint: str = "") -> tuple[Picture, ...]:
        """A picture of one frame; none where there is no content."""
        return () if content is None else (Picture((self.add(what, content),), alt, caption, hint),)

    def turning(
        self, what: str, frames: list[tuple[str, bytes]], alt: str, caption: str, hint: str = ""
    ) -> tuple[Picture, ...]:
        """A picture of several frames, named `what` and the frame's own name."""
        added = tuple(
            self.add(what + re.sub(r"[^A-Za-z0-9]", "", name.title()), content, name) for name, content in frames
        )
        return (Picture(added, alt, caption, hint),)

    def sweep(self) -> None:
        """Remove pictures of this unit that an earlier run left and this one did not draw."""
        for path in (self.out / self.subject / "figures").glob(f"{self.prefix}_desc-*_dwi.*"):
            if path.name not in self.written:
                path.unlink(missing_ok=True)
