"""Work in processes of its own, each forked from a server that has done the imports.

A process of its own makes the peak memory its own, a kill takes nothing else with it, and nothing is left
over from what ran before. :func:`isolated` is one call; :func:`do` brings many jobs to an end, several at
once, and never does again what has written its result.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from scripts.lab.results import JSON, origin
from src.files import write_json


class Failure(RuntimeError):
    """What a process said when it failed."""


def isolated(
    function: Callable[..., Any],
    *args: Any,
    limit: float | None = None,
    env: Mapping[str, str] | None = None,
    log: Path | None = None,
) -> Any:
    """Call ``function``, which a module holds, in a fresh process, and return what it returns.

    Args:
        function: what to call.
        args: what to call it with.
        limit: seconds after which it is stopped, with all that it started.
        env: variables that must be set when the interpreter starts; then nothing is imported yet.
        log: file for what it prints; None leaves it where this process prints.

    Raises:
        Failure: it raised, died, or took too long.
    """
    context: Any = multiprocessing.get_context("spawn" if env else "forkserver")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, log, function, args))
    with patch.dict(os.environ, env or {}):
        process.start()
    theirs.close()
    try:
        if not ours.poll(limit):
            raise Failure(f"stopped after {limit:g} s")
        value, error = ours.recv()
    except EOFError:
        value, error = None, "the process died"
    finally:
        process.kill()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    if error:
        raise Failure(error)
    return value


def _answer(pipe: Connection, log: Path | None, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.setsid()
    if log:
        log.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
    try:
        pipe.send((function(*args), None))
    except BaseException as error:
        traceback.print_exc()
        pipe.send((None, short(error)))


def short(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


# ---------------------------------------------------------------------- many jobs, with results


@dataclass(frozen=True)
class Job:
    """A function and its arguments; the directory is named by their content.

    Attributes:
        label: for people.
        function: what to call, with the directory first.
        at: its directory; ``at/result.json`` is what it returned.
        arguments: keyword arguments, plain values.
    """

    label: str = field(compare=False)
    function: Callable[..., JSON]
    at: Path
    arguments: JSON = field(compare=False)

    @property
    def result(self) -> Path:
        """The file that shows that the job is done."""
        return self.at / "result.json"

    def read(self) -> JSON:
        """What the job returned."""
        return json.loads(self.result.read_text())


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
    waiting, failed = [job for job in wanted if not job.result.exists()], dict[Job, str]()
    os.environ["OMP_NUM_THREADS"] = "1"
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        [job.function.__module__ for job in wanted]
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, speed_estimate_period=3600) as bar, ThreadPoolExecutor(workers) as pool:
        task = bar.add_task(title, total=len(wanted), completed=len(wanted) - len(waiting))
        running = {pool.submit(isolated, perform, job, log=job.at / "log"): job for job in waiting}
        try:
            for ended in as_completed(running):
                job = running[ended]
                if error := ended.exception():
                    failed[job] = f"FAILED, {error} ({job.at}/log)"
                told = failed.get(job) or f"{job.read()['seconds']:.0f} s"
                bar.console.print(f"{job.label}: {told}", markup=False, highlight=False, soft_wrap=True)
                bar.advance(task)
        except KeyboardInterrupt:  # the processes have sessions of their own, which it does not reach
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.kill()
            raise
    return failed


def perform(job: Job) -> None:
    """Do one job in this process, and write its result with its cost."""
    wall, cpu = time.monotonic(), time.process_time()
    out = job.function(str(job.at), **job.arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    cost = {"seconds": time.monotonic() - wall, "cpu_seconds": time.process_time() - cpu, "peak_mib": peak}
    write_json(job.result, {"label": job.label, "commit": origin()["commit"], **cost, **out})
