"""A job array of SLURM as a plain script: one subject after the other in each task, and no process that supervises."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from dsiprep.errors import InputError
from dsiprep.jobs import Job, expected_minutes, memory_needed

__all__ = ["slurm_array"]

LONGEST_ARRAY = 1000  # SLURM's own limit, unless its administrator raised it
MEMORY_MARGIN = 1.2  # over the expected peak

SCRIPT = """\
#!/bin/bash
# Written by `dsiprep-tools array`: submit it with `sbatch`, as often as needed; it resumes where it stopped.
# Add what your cluster wants, such as
#   #SBATCH --partition=long
#   #SBATCH --account=lab
#SBATCH --job-name=dsiprep
#SBATCH --array=0-{last}{at_once}
#SBATCH --cpus-per-task={cores}
#SBATCH --mem={memory}M
#SBATCH --time={time}
#SBATCH --output={logs}/slurm-%A_%a.out
#SBATCH --requeue
subjects=(
{subjects}
)
status=0
for ((n = SLURM_ARRAY_TASK_ID; n < ${{#subjects[@]}}; n += {tasks})); do
  {command} \\
    --participant-label "${{subjects[n]}}" --nprocs {cores} || status=1
done
exit $status
"""


def slurm_array(jobs: Sequence[Job], command: Sequence[str], at_once: int = 0) -> str:
    """Text of the script.

    Parameters
    ----------
    jobs : sequence of Job
        One per subject; the largest determines memory and time, its threads the cores.
    command : sequence of str
        Runs all subjects; the script adds the subject and the number of cores.
    at_once : int
        Largest number of tasks that run at the same time; 0 sets no limit.

    Raises
    ------
    InputError
        If there are no subjects.
    """
    if not jobs:
        raise InputError("there is no subject to process, so no job array was written")
    tasks = min(len(jobs), LONGEST_ARRAY)
    minutes = (60 + 2 * math.ceil(max(expected_minutes(job) for job in jobs))) * math.ceil(len(jobs) / tasks)
    return SCRIPT.format(
        last=tasks - 1,
        at_once=f"%{at_once}" if at_once else "",
        tasks=tasks,
        cores=max(job.threads for job in jobs),
        memory=math.ceil(MEMORY_MARGIN * max(memory_needed(job) for job in jobs)),
        time=f"{minutes // 60:02d}:{minutes % 60:02d}:00",
        logs=_log_folder(jobs[0].out),
        subjects="\n".join(shlex.quote(job.subject) for job in jobs),
        command=shlex.join(command),
    )


def _log_folder(out: Path) -> str:
    """SLURM takes no quotes here: a space ends the option unless it is escaped."""
    return str(out / "logs").replace("%", "%%").replace(" ", "\\ ")
