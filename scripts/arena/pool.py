"""Do jobs, several at once, each in a fresh process that starts with the imports done.

A process of its own makes a job's peak memory its own, and a job that is killed takes no other with it. A job
that is done has written its result, so what is written is never done again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import time
import traceback
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from src.files import write_json
from src.mask import git_sha

PRELOAD = ["scripts.arena.stages", "transformers.models.qwen3.modeling_qwen3"]


@dataclass(frozen=True)
class Job:
    """A function of :mod:`scripts.arena.stages` and its arguments; the directory is named by their content.

    Attributes:
        label: for people.
        stage: name of the function.
        at: its directory; ``at/result.json`` is what it returned.
        arguments: keyword arguments, plain values.
    """

    label: str = field(compare=False)
    stage: str
    at: Path
    arguments: dict[str, Any] = field(compare=False)

    @property
    def result(self) -> Path:
        """The file that shows that the job is done."""
        return self.at / "result.json"

    def read(self) -> dict[str, Any]:
        """What the job returned."""
        found: dict[str, Any] = json.loads(self.result.read_text())
        return found


def do(jobs: Iterable[Job], workers: int, title: str) -> dict[Job, str]:
    """Bring jobs to an end; one that fails does not stop the others.

    Args:
        jobs: in order; equal ones are done once, and those with a result not at all.
        workers: processes at once.
        title: of the progress bar.

    Returns:
        What went wrong, for each job that failed.
    """
    wanted = list(dict.fromkeys(jobs))
    waiting = deque(job for job in wanted if not job.result.exists())
    if not waiting:
        return {}
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    running: dict[int, tuple[BaseProcess, Job]] = {}
    failed: dict[Job, str] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, speed_estimate_period=3600) as bar:
        task = bar.add_task(title, total=len(wanted), completed=len(wanted) - len(waiting))
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    job = waiting.popleft()
                    process: BaseProcess = context.Process(target=perform, args=(job,), daemon=True)
                    process.start()
                    running[process.sentinel] = (process, job)
                for sentinel in wait(list(running)):
                    assert isinstance(sentinel, int)
                    ended, job = running.pop(sentinel)
                    ended.join()
                    if not job.result.exists():
                        failed[job] = reason(job, ended.exitcode)
                    told = failed.get(job) or f"{job.read()['seconds']:.0f} s"
                    bar.console.print(f"{job.label}: {told}", markup=False, highlight=False, soft_wrap=True)
                    bar.advance(task)
        finally:
            for process, _ in running.values():
                process.terminate()
    return failed


def perform(job: Job) -> None:
    """Do one job in this process: output to ``at/log``, the result to ``at/result.json``."""
    from scripts.arena import stages

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    job.at.mkdir(parents=True, exist_ok=True)
    log = os.open(job.at / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    wall, cpu = time.monotonic(), time.process_time()
    try:
        out = getattr(stages, job.stage)(str(job.at), **job.arguments)
    except BaseException as error:
        traceback.print_exc()
        write_json(job.at / "error.json", f"{type(error).__name__}: {error}")
        raise SystemExit(1) from error
    cost = {
        "label": job.label,
        "seconds": time.monotonic() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
        "commit": git_sha(),
    }
    write_json(job.result, {**cost, **out})


def reason(job: Job, code: int | None) -> str:
    """Why a job has no result."""
    error = job.at / "error.json"
    told = json.loads(error.read_text()) if code == 1 and error.exists() else f"ended with {code}"
    return f"FAILED, {' '.join(told.split())[:300]} ({job.at}/log)"
