"""Seeded damage to a tiny BIDS dataset: headers, gzip streams, tables, JSON, names, links, pipes and folders."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from helpers.bids_dataset import Dataset

AP = {"PhaseEncodingDirection": "j-", "TotalReadoutTime": 0.05, "EchoTime": 0.1, "RepetitionTime": 5.0}
PA = {**AP, "PhaseEncodingDirection": "j"}
NUMBERS = ("inf", "-inf", "nan", "1e308", "1e400", "-1", "1e-320", "9" * 400, "0x10", "1_0", "", "1,5", "1e", "--")
VALUES: tuple[object, ...] = (
    None, True, "", "n/a", [], {}, [None], [[1]], {"a": [1]}, "x" * 3000, -1, 0, 1e308, float("inf"), float("nan"),
    10**400, "0.05", [0.05], ["j", "j-"], [1, 2],
    "\u0000", "\ud800", "é", "bids::sub-01/dwi/../../..", "/", ["/dev/zero"],
)  # fmt: skip
FIELDS = (
    "PhaseEncodingDirection", "PhaseEncodingAxis", "TotalReadoutTime", "EffectiveEchoSpacing", "ReconMatrixPE",
    "EchoTime", "EchoTime1", "EchoTime2", "RepetitionTime", "B0FieldIdentifier", "B0FieldSource", "MultipartID",
    "IntendedFor", "ShimSetting", "SliceTiming", "SliceEncodingDirection", "MultibandAccelerationFactor", "ImageType",
    "Units", "SeriesInstanceUID",
)  # fmt: skip
LABELS = ("", "-", "0.8mm", "a_b", "1" * 23, "²", "*", "[a]", "..", " ", "\n", "\udcff", "É", "a-b", "A" * 80)
LINKS = (
    "/dev/zero",
    "/proc/self",
    "/proc/self/mem",
    "/proc/kmsg",
    "nowhere",
    ".",
    "..",
    "/",
    "/dev/tty",
    "/sys/kernel",
)
Damage = Callable[[Dataset, np.random.Generator], str]


def build(root: Path) -> Dataset:
    """A subject with a pair of series, an EPI and a GRE fieldmap, and a T1w."""
    dataset = Dataset(root, (4, 5, 4))
    dataset.dwi("sub-01_dir-AP", AP, volumes=17)
    dataset.dwi("sub-01_dir-PA", PA, volumes=3)
    dataset.image("sub-01_dir-PA_epi", 2, {**PA, "IntendedFor": "dwi/sub-01_dir-AP_dwi.nii.gz"})
    link = {"IntendedFor": "bids::sub-01/dwi/sub-01_dir-AP_dwi.nii.gz"}
    dataset.image("sub-01_phasediff", 1, {"EchoTime1": 0.004, "EchoTime2": 0.0065, **link})
    dataset.image("sub-01_magnitude1", 1, {})
    dataset.image("sub-01_T1w", 1, {})
    return dataset


def damage(dataset: Dataset, seed: int) -> str:
    """Apply one or two kinds of damage; return kind and description of each."""
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(DAMAGES), size=1 + int(rng.random() < 0.3))
    kinds = [DAMAGES[int(index)] for index in chosen]
    return "; ".join(f"{kind.__name__.strip('_')}: {kind(dataset, rng)}" for kind in kinds)


def _pick(dataset: Dataset, rng: np.random.Generator, *endings: str) -> Path | None:
    found = sorted(
        path
        for path in dataset.root.rglob("sub-*")
        if path.name.endswith(endings) and path.is_file() and not path.is_symlink()
    )
    return found[int(rng.integers(len(found)))] if found else None


def _header(dataset: Dataset, rng: np.random.Generator) -> str:
    path = _pick(dataset, rng, ".nii.gz")
    if path is None:
        return "nothing left"
    try:
        content = bytearray(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, zlib.error):
        return "already damaged"
    kind = int(rng.integers(4))
    if kind == 0:  # dims
        value = rng.choice([-32768, -1, 0, 1, 2, 7, 8, 255, 32767])
        start = 40 + 2 * int(rng.integers(8))
        content[start : start + 2] = np.int16(value).tobytes()
    elif kind == 1:  # a float of the header
        value = rng.choice([np.nan, np.inf, -np.inf, 0, -1, 1e30, 1e-30])
        start = int(rng.choice([76, 80, 84, 88, 92, 108, 112, 116, *range(256, 328, 4)]))
        content[start : start + 4] = np.float32(value).tobytes()
    elif kind == 2:  # any bytes of the header
        for _ in range(int(rng.integers(1, 6))):
            content[int(rng.integers(min(348, len(content))))] = int(rng.integers(256))
    else:  # the length
        content = content[: int(rng.integers(len(content)))]
    path.write_bytes(bytes(content) if rng.random() < 0.2 else gzip.compress(bytes(content), 1))
    return f"header of {path.name}, kind {kind}"


def _nifti2(dataset: Dataset, rng: np.random.Generator) -> str:
    import nibabel as nib

    path = _pick(dataset, rng, ".nii.gz")
    if path is None:
        return "nothing left"
    header = nib.Nifti2Header()
    header.set_data_shape((4, 5, 4, 17))
    header.set_sform(np.diag([-2.0, 2, 2, 1]), 1)
    content = bytearray(header.binaryblock + bytes(4 + 4 * 5 * 4 * 17 * 4))
    value = int(rng.choice([-(2**40), -1, 0, 1, 2**31, 2**40, 2**62]))
    start = 16 + 8 * int(rng.integers(8))
    content[start : start + 8] = np.int64(value).tobytes()
    path.write_bytes(gzip.compress(bytes(content), 1))
    return f"NIfTI-2 dimension {value} of {path.name}"


def _gzip(dataset: Dataset, rng: np.random.Generator) -> str:
    path = _pick(dataset, rng, ".nii.gz")
    if path is None:
        return "nothing left"
    content = bytearray(path.read_bytes())
    kind = int(rng.integers(5))
    if kind == 0:
        content = content[: int(rng.integers(len(content) + 1))]
    elif kind == 1:
        content = content[:100]
    elif kind == 2 and content:
        for _ in range(int(rng.integers(1, 20))):
            content[int(rng.integers(len(content)))] = int(rng.integers(256))
    elif kind == 3:
        content = bytearray(gzip.compress(bytes(200_000_000), 9)) if rng.random() < 0.1 else content * 2
    else:
        content = bytearray(rng.integers(0, 256, int(rng.integers(400)), dtype=np.uint8).tobytes())
    path.write_bytes(bytes(content))
    return f"gzip stream of {path.name}, kind {kind}"


def _table(dataset: Dataset, rng: np.random.Generator) -> str:
    path = _pick(dataset, rng, ".bval", ".bvec")
    if path is None:
        return "nothing left"
    rows = [line.split(" ") for line in path.read_bytes().decode("latin-1").splitlines()] or [[""]]
    kind = int(rng.integers(6))
    if kind <= 2:
        row = rows[int(rng.integers(len(rows)))]
        row[int(rng.integers(len(row)))] = str(rng.choice(NUMBERS))
    elif kind == 3:
        rows = [row[: int(rng.integers(len(row) + 1))] for row in rows]
    elif kind == 4:
        value = str(rng.choice(NUMBERS))
        rows = [[value] * len(row) for row in rows]
    text = str(rng.choice(["\n", "\r", "\r\n", "\n# x\n"])).join(
        str(rng.choice([" ", ",", "\t", ";", "  "])).join(r) for r in rows
    )
    content = text.encode("latin-1", "replace")
    if kind == 5:
        content = rng.integers(0, 256, 300, dtype=np.uint8).tobytes()
    path.write_bytes((b"\xef\xbb\xbf" if rng.random() < 0.1 else b"") + content)
    return f"table {path.name}, kind {kind}"


def _json_value(dataset: Dataset, rng: np.random.Generator) -> str:
    path = _pick(dataset, rng, ".json")
    if path is None:
        return "nothing left"
    try:
        content = json.loads(path.read_text())
    except ValueError:
        content = {}
    content = content if isinstance(content, dict) else {}
    field, value = str(rng.choice(FIELDS)), VALUES[int(rng.integers(len(VALUES)))]
    content[field] = value
    path.write_text(json.dumps(content))
    return f"{field} of {path.name} is {repr(value)[:40]}"


def _json_text(dataset: Dataset, rng: np.random.Generator) -> str:
    path = _pick(dataset, rng, ".json")
    if path is None:
        return "nothing left"
    content = path.read_bytes()
    kind = int(rng.integers(6))
    texts = (
        b"[" * 100_000,
        b'{"a":' * 100_000,
        content[: int(rng.integers(len(content) + 1))],
        b'{"EchoTime": ' + b"1" * 5000 + b"}",
        bytes(rng.integers(0, 256, 200, dtype=np.uint8)),
        b"null",
    )
    path.write_bytes(texts[kind])
    return f"text of {path.name}, kind {kind}"


def _name(dataset: Dataset, rng: np.random.Generator) -> str:
    path = _pick(dataset, rng, ".nii.gz", ".json", ".bval", ".bvec")
    if path is None:
        return "nothing left"
    label = str(rng.choice(LABELS))
    head, _, tail = path.name.partition("_")
    kind = int(rng.integers(4))
    many = "_".join(f"k{n}-{n}" for n in range(int(rng.integers(20, 26))))
    name = (
        f"{head}_acq-{label}_{tail}",
        f"sub-{label}_{tail}",
        f"{head}_{many}_{tail}",
        f"{label}{path.name}",
    )[kind]
    try:
        path.rename(path.with_name(name))
    except (OSError, ValueError):
        return "name not allowed here"
    return f"{path.name} renamed to {name!r}"


def _folder_name(dataset: Dataset, rng: np.random.Generator) -> str:
    folders = sorted(path for path in dataset.root.rglob("*") if path.is_dir() and not path.is_symlink())
    if not folders:
        return "nothing left"
    path = folders[int(rng.integers(len(folders)))]
    name = str(rng.choice(["sub-", "ses-"])) + str(rng.choice(LABELS))
    try:
        path.rename(path.with_name(name))
    except (OSError, ValueError):
        return "name not allowed here"
    return f"folder {path.name} renamed to {name!r}"


def _link(dataset: Dataset, rng: np.random.Generator) -> str:
    found = sorted(path for path in dataset.root.rglob("*") if path.is_file() or path.is_dir())
    path = found[int(rng.integers(len(found)))]
    target = str(rng.choice(LINKS))
    moved = dataset.root.parent / "moved"
    if moved.exists():
        return "one link is enough"
    path.rename(moved)
    path.symlink_to(target)
    return f"{path.name} is a link to {target}"


def _no_file(dataset: Dataset, rng: np.random.Generator) -> str:
    path = _pick(dataset, rng, ".nii.gz", ".json", ".bval", ".bvec")
    if path is None:
        return "nothing left"
    path.unlink()
    kind = int(rng.integers(3))
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    return f"{path.name} is {('a pipe', 'a folder', 'missing')[kind]}"


DAMAGES: tuple[Damage, ...] = (
    _header, _header, _nifti2, _gzip, _table, _table, _json_value, _json_value, _json_text, _name, _folder_name, _link,
    _no_file,
)  # fmt: skip
