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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

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
def anatomy_beside(
    unit: Unit, settings: Settings, folder: Path, device: torch.device, threads: int
) -> Iterator[Mapping[str, Callable[[], None]]]:
    """Prepare the structural image of a unit beside what is done meanwhile, if there are cores and memory for both.

    Yields what waits for the stage "anatomy", for `Cache`; nothing if the image is not prepared here. A process that
    fails is not reported: the stage, which then has no result, is computed again by the one that needs it.

    Parameters
    ----------
    unit, settings
        As in `preprocess`.
    folder : Path
        Of the subject's stage results.
    device : torch.device
    threads : int
        For both together.
    """
    image = unit.structural(settings.anatomy.modality)
    found = any(folder.glob("anatomy-*/result.json"))
    room = free_bytes(torch.device("cpu")) > 2 * BESIDE_MB * 2**20
    if threads < BESIDE_THREADS or device.type != "cpu" or not image or found or not room:
        yield {}
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
        yield {"anatomy": wait}
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
