"""Command lines of tiny runs, callbacks that harm them, and processes that can be killed."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from src.cli import main
from src.shorten import stages
from src.training import stopping

CONFIGS = {
    "search": "configs/search/gumbel_topk.yaml",
    "recover": "configs/recover/entropy_kd.yaml",
    "cache": "configs/cache/topk.yaml",
}


class Files:
    """A tiny model, a corpus and a mask, and the command lines on them.

    Args:
        out: directory of the runs.
        teacher: directory of the model.
        corpus: JSONL.
        mask: mask of the model.
    """

    def __init__(self, out: Path, teacher: str, corpus: str, mask: str) -> None:
        self.out, self.teacher, self.corpus, self.mask = out, teacher, corpus, mask

    def command(self, stage: str, version: str, *more: str, steps: int = 8, every: int = 4) -> list[str]:
        """The command line of a run, which keeps a checkpoint of every few steps."""
        verb = "predict" if stage == "cache" else "fit"
        keys = {
            "trainer.logger.init_args.save_dir": self.out,
            "trainer.logger.init_args.version": version,
            "trainer.accelerator": "cpu",
            "data.init_args.train": self.corpus,
            "data.init_args.batch_size": 3,
            "model.init_args.model": self.teacher,
        }
        if stage == "cache":
            keys |= {"model.init_args.out": self.out / version, "model.init_args.shard_positions": 300}
            keys |= {"model.init_args.count_seconds": 0}
        else:
            keys |= {"data.init_args.validation": self.corpus, "trainer.max_steps": steps}
            keys |= {"trainer.limit_val_batches": 1, "trainer.enable_model_summary": "false"}
        if stage == "search":
            keys |= {"model.init_args.draws": 2, "model.init_args.calibration_batches": 2}
        if stage == "recover":
            keys |= {"model.init_args.mask": self.mask, "trainer.val_check_interval": 4}
        saver = "{class_path: src.callbacks.LastCheckpoint, init_args: {every_n_train_steps: %d, "
        saver += "save_top_k: 1, save_last: true, enable_version_counter: false, filename: kept}}"
        saved = [] if stage == "cache" else [f"--trainer.callbacks+={saver % every}"]
        given = [f"--{key}={value}" for key, value in keys.items()]
        return [verb, "--config", CONFIGS[stage], *given, *saved, *more]

    def directory(self, stage: str, version: str) -> Path:
        """Where a run keeps what it writes."""
        return self.out / version if stage == "cache" else self.out / stage / version

    def last(self, stage: str, version: str) -> Path:
        """The last checkpoint of a run."""
        return self.directory(stage, version) / "checkpoints" / "last.ckpt"


def recovery(out: Path, teacher: str, corpus: str, mask: str) -> list[str]:
    """The arguments of a recovery, beside its configs, whose teacher no strategy shards."""
    keys = {"model": teacher, "mask": mask, "teacher.init_args.shard": "false"}
    given = [f"--model.init_args.{key}={value}" for key, value in keys.items()]
    more = ["--trainer.accelerator=cpu", f"--trainer.logger.init_args.save_dir={out}"]
    return [*given, f"--data.init_args.train={corpus}", *more]


def ended(argv: list[str]) -> int:
    """Run a command line in this process; return the status it ends with."""
    try:
        main(argv)
    except SystemExit as e:
        return int(e.code or 0)
    return 0


def forked(work: Callable[[], Any]) -> int:
    """Start ``work``, which computes no gradient, in a process of its own; return its number."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except SystemExit as e:
        os._exit(int(e.code or 0))
    except BaseException:
        os._exit(99)
    os._exit(0)


def nothing() -> None:
    """Do nothing."""


def apart(
    argv: list[str],
    said: Path | str = os.devnull,
    temporary: str | None = None,
    seconds: int = resource.RLIM_INFINITY,
    prepare: Callable[[], None] = nothing,
) -> ForkServerProcess:
    """Start a command line in a process of its own.

    Args:
        argv: the command line.
        said: where what it prints goes.
        temporary: its ``TMPDIR``.
        seconds: of the processor; a process that needs more ends by SIGXCPU.
        prepare: what it does first.
    """
    forks = multiprocessing.get_context("forkserver")  # a process that has trained cannot be forked to train
    forks.set_forkserver_preload(
        ["src.training.arguments", "src.search", "src.recover", "src.cache", "src.data"]
    )
    process = forks.Process(target=_apart, args=(argv, str(said), temporary, seconds, prepare))
    process.start()
    return process


def stages_in_forks() -> None:
    """Let ``shorten`` fork its stages from this process, which has imported all; a new one takes seconds."""
    stages.subprocess = SimpleNamespace(Popen=Fork)  # type: ignore[assignment]


class Fork:
    """A command of ``src.cli`` in a fork of this process, waited for and ended as a ``Popen`` is."""

    def __init__(self, command: list[str], **_: Any) -> None:
        def work() -> None:
            raise SystemExit(ended(command[3:]))

        self.pid, self.status = forked(work), 0

    def wait(self) -> int:
        with suppress(ChildProcessError):  # it was waited for before
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status

    def terminate(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)


def _apart(
    argv: list[str], said: str, temporary: str | None, seconds: int, prepare: Callable[[], None]
) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
    log = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    stopping.unheeded()
    prepare()
    if temporary:
        os.environ["TMPDIR"] = tempfile.tempdir = temporary
    raise SystemExit(ended(argv))


def status(process: ForkServerProcess) -> int:
    """Wait for a process; what it ended with, negative if a signal killed it."""
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def state(path: Path) -> dict[str, Any]:
    """What a checkpoint holds."""
    return torch.load(path, weights_only=True)


def assert_same(one: Any, other: Any, at: str = "") -> None:
    """Two nested values are equal to the last bit."""
    assert type(one) is type(other), at
    if isinstance(one, dict):
        assert list(one) == list(other), at
        for key in one:
            assert_same(one[key], other[key], f"{at}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), at
        for n, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{at}/{n}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), at
    else:
        assert one == other, at


class SignalAt(Callback):
    """Sends this process a signal in the middle of a step, or in another hook.

    Args:
        step: steps that are done by then.
        number: the signal's; 15 is SIGTERM.
        hook: the hook in which it is sent.
    """

    def __init__(self, step: int, number: int = 15, hook: str = "on_train_batch_start") -> None:
        self.step, self.number = step, number
        setattr(self, hook, self.send)

    def send(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if trainer.global_step >= self.step:
            self.step = sys.maxsize
            os.kill(os.getpid(), self.number)


class Ballast(Callback):
    """Makes every checkpoint as large as that of a real model.

    Args:
        megabytes: how large.
    """

    def __init__(self, megabytes: int = 100) -> None:
        self.numbers = torch.arange(megabytes * 250_000, dtype=torch.float32)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self.numbers.add_(1)

    def state_dict(self) -> dict[str, Any]:
        return {"numbers": self.numbers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.numbers = state_dict["numbers"]


class Spoiled(Callback):
    """Fills what trains with NaN after the first step."""

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data.fill_(torch.nan)


class FullDisk(Callback):
    """Lets no file grow beyond a few bytes from a step on."""

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.global_step == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))


class Vanish(Callback):
    """Removes the directory of the run while it trains."""

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.global_step == 6:
            shutil.rmtree(str(trainer.log_dir))


class Pause(Callback):
    """Waits for ever in a hook.

    Args:
        hook: where.
        mark: a file that then appears.
    """

    def __init__(self, hook: str, mark: str) -> None:
        self.mark = Path(mark)
        setattr(self, hook, self.pause)

    def pause(self, *_: Any) -> None:
        self.mark.touch()
        signal.pause()
