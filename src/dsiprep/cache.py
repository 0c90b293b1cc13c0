"""Stage results on disk, computed once and found again by their lineage.

The key of a result is a hash of its lineage: the source of the stage and of every module it reaches, the versions of
the numerical libraries, the settings and the keys of its inputs; input files enter by their contents. A result is a
folder of `.npy` arrays and one `result.json`, written under a temporary name and renamed, so a folder that exists is
complete and an interrupted run resumes where it stopped. Results are read back memory-mapped before the next stage sees
them, so a fresh and a resumed run work on the same numbers. A series that a stage passes on unchanged is stored once,
under a second name, and of images that are zero in many voxels only the others are stored.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import inspect
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch

from dsiprep import settings as settings_module
from dsiprep.data import acquisition, dwi, gradient_coil, grid, motion, qspace, results, template, transform
from dsiprep.errors import DsiprepError, InputError, OutputError
from dsiprep.io.files import content_digest
from dsiprep.mapped import file_of, map_tensor, release_memory
from dsiprep.sources import source_digest

T = TypeVar("T")
LIBRARIES = {
    name: version(name) for name in ("numpy", "scipy", "numba", "torch", "SimpleITK", "scikit-image", "deepbet")
}
INLINE = 256  # largest array that is stored in the JSON file, where it can be read
MAPPED = 2**20  # bytes above which an array is mapped into memory instead of read
DENSE = 2**25  # values from which on an array is stored whatever it holds, as it should be mapped
ZEROS = 0.25  # share of zeros from which on they are left out

TYPES: dict[str, type] = {
    name: kind
    for module in (acquisition, dwi, gradient_coil, grid, motion, qspace, results, template, transform, settings_module)
    for name, kind in vars(module).items()
    if isinstance(kind, type) and dataclasses.is_dataclass(kind)
}


class CachedResult(Generic[T]):
    """A result and the key of its lineage; `value` is computed or loaded when it is asked for.

    A result on disk is mapped into memory anew each time, so that pages one stage has read do not stay resident while
    others run.
    """

    def __init__(self, key: str, make: Callable[[], T], on_disk: bool = False) -> None:
        self.key = key
        self._make = make
        self._on_disk = on_disk
        self._value: T | None = None

    @property
    def value(self) -> T:
        """The result itself."""
        if self._on_disk:
            return self._make()
        if self._value is None:
            self._value = self._make()
        return self._value


class Cache:
    """Stage results in a folder, or in memory only.

    Parameters
    ----------
    folder : Path or None
        One folder per subject, so that its sessions share the anatomy. None keeps results in memory.
    started : callable, optional
        Called with the name of each stage that is about to be computed, not of those found.
    only_found : bool
        Compute nothing; a missing result is an error.
    elsewhere : mapping
        Names of stages whose results another process is computing, and what waits for it.
    """

    def __init__(
        self,
        folder: Path | None,
        started: Callable[[str], None] = lambda name: None,
        only_found: bool = False,
        elsewhere: Mapping[str, Callable[[], None]] = MappingProxyType({}),
    ) -> None:
        self.folder = folder
        self.started = started
        self.only_found = only_found
        self.elsewhere = elsewhere
        self.seconds: dict[str, float] = {}
        self._in_memory: dict[str, object] = {}

    def files(
        self, reader: ModuleType, paths: tuple[Path, ...], facts: object, read: Callable[[], T]
    ) -> CachedResult[T]:
        """What `read` returns, keyed by the contents of `paths`, by `facts` about them and by the `reader`'s source."""
        digest = hashlib.sha256(plain_text([facts, source_digest(reader.__name__)]).encode())
        for path in paths:
            digest.update(content_digest(path))
        return CachedResult(digest.hexdigest(), read)

    def run(self, stage: ModuleType, name: str, function: Callable[..., T], *inputs: object) -> CachedResult[T]:
        """`function(*inputs)`, from the cache if it is there.

        Parameters
        ----------
        stage : module
            Its source, and that of all modules that it reaches, is part of the key.
        name : str
            Name of the step, for display and for the key: "motion-up".
        function : callable
            Pure: its result depends on its inputs only.
        inputs : CachedResult, tuple of CachedResult, settings or plain values
            `CachedResult` inputs are passed on as their values.
        """
        code = [LIBRARIES, source_digest(stage.__name__), _source_of(function)]
        lineage = [name, code, [_lineage(item) for item in inputs]]
        key = hashlib.sha256(plain_text(lineage).encode()).hexdigest()
        if self.folder is None:
            if key not in self._in_memory:
                self._in_memory[key] = self._timed(name, function, inputs)
            return CachedResult(key, lambda: cast(T, self._in_memory[key]))
        target = self.folder / f"{name}-{key[:12]}"
        if not (target / "result.json").exists() and name in self.elsewhere:
            self.elsewhere[name]()
        if not (target / "result.json").exists():
            value = self._timed(name, function, inputs)
            _store(target, value, {"stage": name, "key": key, "seconds": self.seconds[name]})
            del value
        else:
            self.seconds[name] = json.loads((target / "result.json").read_text())["about"]["seconds"]
        return CachedResult(key, lambda: _load(target), on_disk=True)

    def derive(self, function: Callable[..., T], *inputs: CachedResult[Any]) -> CachedResult[T]:
        """`function(*inputs)` where it is too cheap to be stored; its key follows from those of its inputs."""
        lineage = [_source_of(function), [item.key for item in inputs]]
        key = hashlib.sha256(plain_text(lineage).encode()).hexdigest()
        return CachedResult(key, lambda: function(*(item.value for item in inputs)))

    def _timed(self, name: str, function: Callable[..., T], inputs: tuple[object, ...]) -> T:
        if self.only_found:
            raise InputError(
                f"stage {name} has no result in {self.folder}; run once with the same options and --keep-work"
            )
        self.started(name)
        release_memory()
        start = time.perf_counter()
        value = function(*(_value(item) for item in inputs))
        self.seconds[name] = round(time.perf_counter() - start, 2)
        return value

    def for_other_unit(self) -> Cache:
        """The same folder for another unit, whose times are counted separately."""
        return Cache(self.folder, self.started, self.only_found, self.elsewhere)

    def clear(self) -> None:
        """Remove all stored results."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


class LockedError(DsiprepError):
    """Another process works on the same subject."""


@contextmanager
def exclusive(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Keep other processes from the results in `folder` meanwhile; the operating system ends a lock with its owner.

    Raises
    ------
    LockedError
        If another process holds the lock and does not release it within `patience` seconds.
    """
    path = folder.with_name(f"{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    give_up = time.monotonic() + patience
    while True:
        with path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < give_up:
                    time.sleep(0.2)
                    continue
                owner = path.read_text() or "another process"
                raise LockedError(
                    f"{folder.name}: {owner} is processing this subject with the work folder {folder.parent}; wait for "
                    "it, or give --work-dir another folder and the results another output folder"
                ) from None
            except OSError:  # a file system without locks
                yield
                return
            if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
                continue  # the previous owner removed the file after it had been opened here
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _source_of(function: Callable[..., object]) -> str:
    """The source of what calls a stage, which may stand outside the stage's module."""
    while isinstance(function, partial):
        function = function.func
    try:
        return inspect.getsource(function)
    except (TypeError, OSError):  # an object that is called, or code typed at a prompt
        return type(function).__qualname__


def _value(item: object) -> object:
    if isinstance(item, CachedResult):
        return item.value
    return tuple(_value(part) for part in item) if isinstance(item, tuple) else item


def _lineage(item: object) -> object:
    if isinstance(item, CachedResult):
        return item.key
    return [_lineage(part) for part in item] if isinstance(item, tuple) else item


def plain_text(item: object) -> str:
    """Settings, plain values, paths and dataclasses of them as text that is the same in every process."""
    return json.dumps(item, sort_keys=True, default=_describe)


def _describe(item: object) -> object:
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        return {type(item).__name__: {f.name: getattr(item, f.name) for f in dataclasses.fields(item)}}
    if isinstance(item, np.ndarray):
        return item.tolist()
    if isinstance(item, Path | torch.device):
        return str(item)
    raise TypeError(f"{type(item).__name__} cannot be part of a cache key")


def _store(target: Path, value: object, about: dict[str, Any]) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as problem:
        raise OutputError(f"{target.parent}: {problem.strerror}; choose another folder with --work-dir") from problem
    try:
        tree = _encode(value, beside, "result")
        about |= {"threads": torch.get_num_threads()}
        (beside / "result.json").write_text(json.dumps({"about": about, "result": tree}, indent=1))
        try:
            beside.rename(target)
        except OSError:  # another process was first with the same lineage, hence the same numbers
            if not (target / "result.json").exists():
                raise
    except OSError as problem:  # NumPy tells a full disk by the number of bytes alone
        why = problem.strerror or f"no space left ({problem})"
        raise OutputError(f"{target.parent}: {why}; make room, or choose another folder with --work-dir") from problem
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _encode_tensor(item: torch.Tensor, folder: Path, name: str) -> object:
    values, file = item.detach().cpu().numpy(), folder / f"{name}.npy"
    known = file_of(item)
    if known is not None and _is_stored(values, known):
        try:
            os.link(known, file)
            return {"tensor": file.name}
        except OSError:  # a file system on which a file has one name
            pass
    if MAPPED / 4 < values.size < DENSE and np.count_nonzero(values) <= (1 - ZEROS) * values.size:
        inside = values != 0
        others = values[inside]
        single = others[:1] if len(others) and (others == others[0]).all() else others
        np.save(file, single)
        np.save(folder / f"{name}.where.npy", np.packbits(inside))
        return {"sparse": file.name, "where": f"{name}.where.npy", "shape": values.shape}
    np.save(file, values)
    return {"tensor": file.name}


def _is_stored(values: np.ndarray, file: Path) -> bool:
    """Whether a file holds these values, which a stage may have changed in memory."""
    try:
        stored = np.load(file, mmap_mode="r")
    except (OSError, ValueError):
        return False
    same = stored.shape == values.shape and stored.dtype == values.dtype
    return same and all(np.array_equal(a, b) for a, b in zip(stored, values, strict=True))


def _encode(item: object, folder: Path, name: str) -> object:
    if isinstance(item, torch.Tensor):
        return _encode_tensor(item, folder, name)
    if isinstance(item, np.ndarray):
        if item.size <= INLINE and item.dtype.kind in "fiub":
            return {"array": item.tolist(), "dtype": item.dtype.str, "shape": item.shape}
        np.save(folder / f"{name}.npy", item)
        return {"npy": f"{name}.npy"}
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        parts = {f.name: _encode(getattr(item, f.name), folder, f"{name}.{f.name}") for f in dataclasses.fields(item)}
        return {"type": type(item).__name__, "fields": parts}
    if isinstance(item, tuple):
        return {"tuple": [_encode(part, folder, f"{name}.{i}") for i, part in enumerate(item)]}
    if isinstance(item, list):
        return [_encode(part, folder, f"{name}.{i}") for i, part in enumerate(item)]
    if isinstance(item, dict):
        return {"dict": [[key, _encode(part, folder, f"{name}.{key}")] for key, part in item.items()]}
    if isinstance(item, Path):
        return {"path": str(item)}
    return item.item() if isinstance(item, np.generic) else item


def _load(target: Path) -> Any:
    return _decode(json.loads((target / "result.json").read_text())["result"], target)


def _load_tensor(path: Path) -> torch.Tensor:
    """A tensor from a file; a large one stays there, to be read when it is needed."""
    if path.stat().st_size <= MAPPED:
        return torch.from_numpy(np.load(path))
    return map_tensor(path)


def _decode(tree: Any, folder: Path) -> Any:
    if isinstance(tree, list):
        return [_decode(part, folder) for part in tree]
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree:
        return _load_tensor(folder / tree["tensor"])
    if "sparse" in tree:
        values, shape = np.load(folder / tree["sparse"]), tree["shape"]
        inside = np.unpackbits(np.load(folder / tree["where"]), count=int(np.prod(shape))).view(bool)
        whole = np.zeros(len(inside), values.dtype)
        whole[inside] = values
        return torch.from_numpy(whole.reshape(shape))
    if "npy" in tree:
        return np.load(folder / tree["npy"])
    if "array" in tree:
        return np.array(tree["array"], dtype=tree["dtype"]).reshape(tree["shape"])
    if "tuple" in tree:
        return tuple(_decode(part, folder) for part in tree["tuple"])
    if "dict" in tree:
        return {key: _decode(part, folder) for key, part in tree["dict"]}
    if "path" in tree:
        return Path(tree["path"])
    return TYPES[tree["type"]](**{key: _decode(part, folder) for key, part in tree["fields"].items()})
