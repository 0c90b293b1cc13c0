"""The structural image in a process of its own, while motion and distortion, which do not need it, are estimated.

The steps of a subject scale to some cores only, so that many cores are better shared by two of them. The process works
in the subject's folder of stage results, where it leaves its result, and ends with its parent.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from dsiprep.cache import Cache
from dsiprep.costs import BESIDE_MB, BESIDE_THREADS
from dsiprep.data.acquisition import Unit
from dsiprep.device import free_bytes, use_threads
from dsiprep.settings import Settings

__all__ = ["anatomy_beside"]

COMMAND = (sys.executable, "-m", __name__)
SHARE = 3  # of the threads, one in so many is for the structural image


@contextmanager
def anatomy_beside(unit: Unit, settings: Settings, cache: Cache, device: torch.device, threads: int) -> Iterator[None]:
    """Prepare the structural image of a unit beside what is done meanwhile, if there are cores and memory for both.

    The stage "anatomy" then waits for it (`Cache.elsewhere`). A process that fails is not reported: the stage, which
    has no result, is computed by the one that needs it.

    Parameters
    ----------
    unit, settings
        As in `preprocess`.
    cache : Cache
        Of the unit.
    device : torch.device
    threads : int
        For both together.
    """
    folder = cache.folder
    if threads < BESIDE_THREADS or device.type != "cpu" or folder is None or cache.only_found:
        yield
        return
    found = any(folder.glob("anatomy-*/result.json"))
    room = free_bytes(device) > 2 * BESIDE_MB * 2**20
    if found or not room or not unit.structural(settings.anatomy.modality):
        yield
        return
    own = threads // SHARE
    process = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert process.stdin is not None

    def wait() -> None:
        process.wait()
        use_threads(threads)

    try:
        use_threads(threads - own)
        with suppress(OSError):  # it may have ended
            pickle.dump((unit, settings, folder, own), process.stdin)
            process.stdin.flush()  # and is left open, so that its end is that of this process
        cache.elsewhere = {"anatomy": wait}
        yield
    finally:
        process.kill()
        process.wait()
        with suppress(OSError):
            process.stdin.close()
        use_threads(threads)


def main() -> None:
    """Body of the process."""
    from dsiprep.pipeline import prepare_anatomy

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    unit, settings, folder, threads = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    use_threads(threads)
    prepare_anatomy(unit, settings, Cache(folder), torch.device("cpu"))


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
