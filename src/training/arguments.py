"""Adapt Lightning's command line: short errors, faults found early, one tokenizer for model and data."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn, cast

import lightning
from jsonargparse import Namespace
from lightning import LightningModule
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from src.data.options import sources
from src.errors import ConfigError, did_you_mean, first_line
from src.mask import Mask
from src.training import resuming, threads, watchdog
from src.training.identity import Accepting, Resumable, settings_of
from src.training.lock import lock
from src.training.parse_faults import in_short
from src.training.settings import check_settings
from src.training.stage import Stage
from src.training.strategies import check_checkpoint, check_installed
from src.training.trainer import Trainer

_DISK = {
    errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG,
    errno.ENOENT, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS,
}  # fmt: skip
"""Error numbers of faults of a disk or a name: full, read-only, vanished, no directory, too long."""


class ShortErrors(LightningArgumentParser):
    """A parser that answers a fault with one message, not with a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a fault as one message; for an unknown key it names the nearest one that exists.

        A nested parser raises what jsonargparse does, so that the outer one can add the key's path.

        Raises:
            ConfigError: always, except in a nested parser.
        """
        names = [name for action in self._actions for name in (action.dest, action.dest.split(".")[-1])]
        hint = _suggestion(message, names)
        if not self.exit_on_error:
            super().error(message + hint, ex)
        raise ConfigError(in_short(message + hint)) from ex

    def parse_args(  # type: ignore[override]  # argparse has overloads, and jsonargparse none
        self, args: Sequence[str] | None = None, *more: Any, **keys: Any
    ) -> Namespace:
        """Parse as jsonargparse does, but read ``key=None`` as null in a nested parser.

        jsonargparse hands a null on to nested parsers in that form, which they would read as text.
        """
        if not self.exit_on_error and isinstance(args, list):
            args = [arg.removesuffix("None") + "null" if str(arg).endswith("=None") else arg for arg in args]
        return super().parse_args(args, *more, **keys)


class SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` only once a fit begins, so that a refused resume leaves the run's own file.

    A validation or a test writes none: a run is resumed by the file beside its checkpoints.
    """

    def setup(self, trainer: lightning.Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "predict":
            super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")


class PruneCLI(LightningCLI):
    """LightningCLI, with settings checked before anything is built, and one tokenizer for model and data.

    Args:
        args: the command line; its first word is the verb.
        keys: as those of LightningCLI.
    """

    def __init__(self, args: Sequence[str], **keys: Any) -> None:
        self._verb = args[0]
        super().__init__(args=list(args), **keys)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # it is always asked of an object
        """Name the verb at hand alone: to build the parsers of all four takes as long as to parse."""
        return {self._verb: super().subcommands()[self._verb]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options that belong neither to trainer nor to model nor to data."""
        keys = "keys, with commas between, whose change on resume is meant: --accept model.init_args.draws"
        parser.add_argument("--accept", type=str, default="", help=keys)
        parser.add_argument("--threads", type=int | None, default=None, help=threads.HELP)

    def _prepare_subcommand_parser(self, *about: Any, **keys: Any) -> LightningArgumentParser:
        """Say in ``--help`` what ``--ckpt_path`` does here, in place of Lightning's words."""
        parser = super()._prepare_subcommand_parser(*about, **keys)
        for action in parser._actions:
            if action.dest == "ckpt_path":
                action.help = resuming.HELP
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, then check all settings before the first of them is used.

        Raises:
            ConfigError: a setting is at fault; names its key.
        """
        super().parse_arguments(parser, args)
        config = self.config[self.config.subcommand]
        check_settings(config)
        if config.trainer.enable_progress_bar is False:  # Lightning refuses the two together
            given = config.trainer.callbacks or []  # one, or a list
            listed = given if isinstance(given, list) else [given]
            config.trainer.callbacks = [callback for callback in listed if not _shows_progress(callback)]

    def before_instantiate_classes(self) -> None:
        """Let data use the model's tokenizer, repairs and prompts the data's rows, if they name no others.

        Raises:
            ConfigError: there are no data, or an engine of the strategy is not installed.
        """
        config = self.config[self.subcommand] if self.subcommand else self.config
        if config.get("data") is None:
            raise ConfigError("data: not given. Add a data section, such as class_path: src.data.Corpus.")
        check_installed(config.trainer.strategy)
        model, data = config.model.init_args, config.data.init_args
        if "tokenizer" in data and data.tokenizer is None:
            mask = model.get("mask")
            data.tokenizer = model.get("model") or (Mask.load(mask).model if mask else None)
        repair = getattr(model.get("patch"), "init_args", Namespace())
        for part, key in ((repair, "data"), (model, "rows")):
            if part.get(key, "") is None and "tokenizer" in data:  # a cache holds no text
                for source in sources(data.train, "data.train")[:1]:
                    part[key] = source.path
                    if part is repair:  # it reads no row that training does not
                        part.rows = min(part.rows, source.rows or part.rows)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer, add the callbacks that every run has, and settle the number of threads.

        They are added afterwards. If they were passed to Lightning, it would refuse
        ``enable_checkpointing: false``, because the one that stops on signals derives from ``Checkpoint``.

        Raises:
            ConfigError: Lightning cannot build it, for want of a GPU for instance; gives Lightning's words.
        """
        always = self.trainer_defaults.pop("callbacks", [])
        try:
            trainer = super().instantiate_trainer(**kwargs)
            assert isinstance(trainer, Trainer)
            getattr(trainer, "callbacks").extend(always)  # noqa: B009 (mypy)
            ranks = trainer.num_devices if trainer.strategy.launcher else 1
            threads.settle(self.config[self.subcommand or "fit"].threads, ranks)
            return trainer
        except ConfigError:
            raise
        except (ImportError, OverflowError, RuntimeError, TypeError, ValueError) as e:
            raise ConfigError(f"trainer: {first_line(e)}") from e

    def instantiate_classes(self) -> None:
        """Build trainer, model and data, and refuse what they cannot do together before processes start.

        Raises:
            ConfigError: a part cannot be built, or parts do not fit each other.
        """
        try:
            super().instantiate_classes()
        except ConfigError:
            raise
        except (ImportError, OverflowError, TypeError, ValueError) as e:
            raise _unbuilt(e) from e
        self._note_settings()
        if isinstance(self.model, Stage):
            self.model.refuse(self.trainer, self.datamodule)
        check_checkpoint(self.trainer, self.config[self.subcommand or "fit"].get("ckpt_path"))
        watchdog.replace_launcher_watch()

    def _run_subcommand(self, subcommand: str) -> None:
        """Run, with the log directory locked against other runs; the first rank holds the lock for all.

        A run that is refused before its first step leaves no directory, and uses up no version's number.
        """
        directory = self.trainer.log_dir
        if not (directory and self.trainer.loggers and self.trainer.is_global_zero) or "://" in directory:
            super()._run_subcommand(subcommand)
            return
        new = not Path(directory).exists()
        try:
            with lock(directory, "trainer.logger.init_args.version"):
                super()._run_subcommand(subcommand)
        except Exception as error:
            if new and not self.trainer.global_step and user_fault(error):
                shutil.rmtree(directory, ignore_errors=True)
            raise

    def _note_settings(self) -> None:
        """Give the model the settings that checkpoints record; give it and the data the accepted keys."""
        model, data = cast(Resumable, self.model), cast(Accepting, self.datamodule)
        plain: dict[str, Any] = self.config_dump  # as Lightning wrote it to build the two
        model.settings = settings_of(plain)
        model.accepted = data.accepted = [key for key in plain["accept"].split(",") if key]

    def _parse_ckpt_path(self) -> None:
        """Do nothing on resume: YAML and command line decide. Lightning would let the checkpoint win."""


def _unbuilt(error: BaseException) -> ConfigError:
    """Return the error that says why a part of the experiment cannot be built.

    jsonargparse wraps what a constructor raises.
    """
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    faults = [link for link in chain if isinstance(link, ConfigError)]
    if faults:
        return ConfigError(str(faults[-1]))  # a new one: it is raised from the end of this very chain
    missing = next((link for link in chain if isinstance(link, ImportError)), None)
    if missing is not None:
        return ConfigError(f"a part of this experiment is not installed: {first_line(missing)}")
    return ConfigError(f"a part of this experiment cannot be built: {in_short(str(error))}")


def _shows_progress(callback: Any) -> bool:
    return issubclass(resolve_name(callback.class_path), ProgressBar)


def user_fault(error: BaseException | None) -> ConfigError | None:
    """Return the fault of the user that is behind an error, as a :class:`ConfigError`; None if there is none.

    jsonargparse wraps what a constructor raises, so causes are searched too.
    """
    while error is not None and not isinstance(error, ConfigError):
        if isinstance(error, OSError) and error.errno in _DISK:
            name = f"'{error.filename}'" if error.filename else "the directory of the run"
            return ConfigError(
                f"cannot use {name}: {error.strerror}. Make room, or choose another directory "
                f"(trainer.logger.init_args.save_dir, or --out)."
            )
        if isinstance(error, MisconfigurationException):
            return ConfigError(f"trainer: {error}")
        error = error.__cause__
    return error


def _suggestion(message: str, names: list[str]) -> str:
    """Return a hint at the nearest key if jsonargparse's message says that one is unknown; else nothing."""
    unknown = re.search(r"(?:Option|Key|key|arguments?:?) '?(?:--)?([\w.]+)'?", message)
    wrong = "not accepted" in message or "nrecognized" in message or "not expected" in message
    if not (unknown and wrong) or "Did you mean" in message:
        return ""
    return did_you_mean(unknown.group(1), names)
