"""Choose how many CPU threads a command computes on: as many as the machine gives to its process.

PyTorch takes a thread for each core that it sees, whatever share of them a container gives to the process.
Threads beyond that share wait for each other more than they work. The number does not follow the momentary
load, because the order of sums, and so the last bits of a result, depends on it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from src.ranges import Range
from src.training.control_groups import ROOT, processors, words

VARIABLE = "OMP_NUM_THREADS"
NUMBER = Range(int, 1, 1024)
HELP = f"CPU threads of each process (default: the cores that it may use; {VARIABLE} wins over that)"


def settle(asked: int | None = None, processes: int = 1) -> None:
    """Set the number of threads of this process and of those that it starts.

    What is asked for comes first, then the environment, then :func:`usable`; it is never more than PyTorch's
    own number unless asked. A number that is not PyTorch's is told in one line.

    Args:
        asked: number of threads that the user asks for, or None.
        processes: number of processes that this one is to become, which share the machine.
    """
    import torch

    own = torch.get_num_threads()
    if asked is None and VARIABLE in os.environ:
        return
    cores, reason = usable()
    number = asked or min(own, max(1, cores // processes))
    if asked or processes > 1:
        os.environ[VARIABLE] = str(number)  # of the processes that this one starts
    if number != own:
        torch.set_num_threads(number)
    if number < own and not asked:
        print(f"threads: {number}, not {own}: {reason}. --threads N sets another number.", file=sys.stderr)


def usable(root: Path = ROOT) -> tuple[int, str]:
    """Return how many cores this process may use, at least 1, and what limits them, in words.

    Two hyperthreads of a core count once, where the kernel tells them apart.

    Args:
        root: directory of the file systems ``proc`` and ``sys``.
    """
    allowed = (
        sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    cores = len({_siblings(root, number) for number in allowed})
    share = min(processors(root), default=float("inf"))
    if share < cores:
        return max(1, int(share)), f"the container may use {share:g} processors"
    return cores, f"the process may use {cores} cores"


def _siblings(root: Path, number: int) -> str:
    """Return the hyperthreads of the core of a processor, as the kernel lists them; itself if it does not."""
    file = root / f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list"
    return next(iter(words(file)), str(number))
