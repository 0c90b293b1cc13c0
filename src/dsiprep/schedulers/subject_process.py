"""One subject in a process of its own, which may be killed without harm to the process that started it.

The process ends with its parent: a subject whose worker died is not processed twice at the same time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from dsiprep.jobs import Job, Outcome, StepCallback, run_subject

__all__ = ["SubjectProcess"]

COMMAND = (sys.executable, "-m", __name__)
PATIENCE = 30.0  # seconds for which a second try waits for a process that is about to end


class SubjectProcess:
    """A running subject.

    Parameters
    ----------
    job : Job
    stop_on_first_crash : bool
    environment : mapping
        Variables in addition to those of this process.

    Attributes
    ----------
    connection : Connection
        Becomes readable when `receive` has something to return.
    """

    def __init__(self, job: Job, stop_on_first_crash: bool, environment: Mapping[str, str] | None = None) -> None:
        self.job = job
        self.connection, child = Pipe()
        handle = child.fileno()
        self.process = subprocess.Popen(
            [*COMMAND, str(handle)],
            pass_fds=(handle,),
            env={**os.environ, **(environment or {})},
        )
        child.close()  # the process's copy alone stays open, so that its death ends the connection
        with contextlib.suppress(OSError):  # it was killed already, which `receive` will report
            self.connection.send((job, stop_on_first_crash))

    def receive(self, on_step: StepCallback) -> tuple[bool, list[Outcome] | None]:
        """Wait for one message: (False, None) after a step, (True, outcomes) at the end, (True, None) if it was killed.

        `on_step` is called with (unit, step) before a step is computed.
        """
        try:
            message = self.connection.recv()
        except (EOFError, ConnectionResetError):
            message = None
        if isinstance(message, tuple):
            on_step(*message)
            return False, None
        self.connection.close()
        self.process.wait()
        return True, message

    def finish(self, on_step: StepCallback) -> list[Outcome] | None:
        """Wait for the outcomes; None if the process was killed."""
        ended, outcomes = False, None
        while not ended:
            ended, outcomes = self.receive(on_step)
        return outcomes

    def stop(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.wait()
        self.connection.close()


def main(handle: int) -> None:
    """Body of the process: read a job from the connection, run it, and send its steps and its outcomes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    connection = Connection(handle)
    job, stop_on_first_crash = connection.recv()
    threading.Thread(target=_end_with, args=(connection,), daemon=True).start()

    def send_step(unit: str, step: str) -> None:
        connection.send((unit, step))

    connection.send(list(run_subject(job, send_step, stop_on_first_crash, PATIENCE)))


def _end_with(connection: Connection) -> None:
    """End this process when the parent, which sends nothing more, ends."""
    try:
        connection.recv()
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]))
