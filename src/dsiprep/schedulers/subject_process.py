"""One subject after another in a process of its own, which may be killed without harm to the one that started it.

The process ends with its parent: a subject whose worker died is not processed twice at the same time. Starting it costs
seconds of CPU time (Python, its libraries, machine code of the kernels), so it can take another subject afterwards.
"""

from __future__ import annotations

import contextlib
import os
import queue
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
        self.take(job, stop_on_first_crash)

    def take(self, job: Job, stop_on_first_crash: bool) -> None:
        """Run another job, after the outcomes of the last one."""
        self.job = job
        with contextlib.suppress(OSError):  # it was killed already, which `receive` will report
            self.connection.send((job, stop_on_first_crash))

    @property
    def lives(self) -> bool:
        """Whether the process can take another job."""
        return not self.connection.closed and self.process.poll() is None

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
        if message is None:
            self.connection.close()
            self.process.wait()
        return True, message

    def finish(self, on_step: StepCallback) -> list[Outcome] | None:
        """Wait for the outcomes, then end the process; None if it was killed."""
        ended, outcomes = False, None
        while not ended:
            ended, outcomes = self.receive(on_step)
        self.stop()
        return outcomes

    def stop(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.wait()
        self.connection.close()


def main(handle: int) -> None:
    """Body of the process: run the jobs that come through the connection, and send their steps and outcomes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    connection = Connection(handle)
    jobs: queue.SimpleQueue[tuple[Job, bool]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, jobs), daemon=True).start()

    def send_step(unit: str, step: str) -> None:
        connection.send((unit, step))

    while True:
        job, stop_on_first_crash = jobs.get()
        connection.send(list(run_subject(job, send_step, stop_on_first_crash, PATIENCE)))


def _listen(connection: Connection, jobs: queue.SimpleQueue[tuple[Job, bool]]) -> None:
    """Pass jobs on until the parent ends, and this process with it."""
    try:
        while True:
            jobs.put(connection.recv())
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]))
