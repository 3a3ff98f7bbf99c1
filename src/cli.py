"""Entry point of every stage: ``python -m src.cli <verb> ...``.

Lightning's verbs (fit, validate, test, predict) carry the stages; the table adds what it has no verb for.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import warnings
from typing import Any, NoReturn

from lightning import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies.launchers import subprocess_script
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from src.errors import ConfigError, did_you_mean
from src.mask import Mask
from src.training import watchdog
from src.training.refusals import check_checkpoint

TOOLS = {
    "plan": "tell memory, hours and disk of a run before it starts: plan --config ... --device h100",
    "export": "write the shortened model as a plain Hugging Face directory, proven equal",
    "patch": "export the shortened model with its cuts repaired, without training, on a few rows",
    "evaluate": "held-out KL, agreement, exact match; beside the teacher",
    "benchmark": "measured prefill and decode speed against another model and the ideal",
    "report": "gather a run's figures into a table, JSON, Markdown and HTML",
    "preview": "print a few rows of a corpus with what is supervised",
}
MODULES = {
    "plan": "src.plan.verb",
    "export": "src.export.verb",
    "patch": "src.repair.verb",
    "evaluate": "src.evaluate.verb",
    "benchmark": "src.benchmark",
    "report": "src.report.verb",
    "preview": "src.preview",
}
"""Where each tool of the table is; a verb's package is imported only when it is asked for."""
VERBS = {
    "fit": "run a search or a recovery: fit --config configs/search/gumbel_topk.yaml",
    "validate": "held-out divergence of a search or a recovery",
    "test": "the same, once, at the end",
    "predict": "write the teacher's cache: predict --config configs/cache/topk.yaml",
}


class ShortErrors(LightningArgumentParser):
    """A parser that answers a fault with one message, not with a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Add a suggestion; a nested parser raises, so that the outer one can add the key's path."""
        hint = _suggest(message, [key for action in self._actions for key in _names(action.dest)])
        if not self.exit_on_error:
            super().error(message + hint, ex)
        raise ConfigError(message + hint) from ex


class PruneCLI(LightningCLI):
    """LightningCLI with the model's name shared with the data."""

    def before_instantiate_classes(self) -> None:
        """Let the data use the model's tokenizer unless it names its own."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        if config.get("data") is None:
            raise ConfigError("data: not given. Add a data section, such as class_path: src.data.Corpus.")
        if "class_path" in (strategy := config.trainer.strategy):
            module, _, name = strategy.class_path.rpartition(".")
            getattr(getattr(importlib.import_module(module), name), "check_installed", lambda: None)()
        model, data = config.model.init_args, config.data.init_args
        if "tokenizer" in data and data.tokenizer is None:
            data.tokenizer = model.get("model") or (Mask.load(model.mask).model if "mask" in model else None)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer; Lightning's own words where it knows no such strategy, or lacks a GPU for it."""
        try:
            return super().instantiate_trainer(**kwargs)
        except ConfigError:
            raise
        except ValueError as e:
            raise ConfigError(f"trainer: {e}") from e

    def instantiate_classes(self) -> None:
        """Build trainer, model and data; refuse what they cannot do together before processes start."""
        super().instantiate_classes()
        refuse = getattr(self.model, "refuse", None)
        if refuse is not None:
            refuse(self.trainer, self.datamodule)
        check_checkpoint(self.trainer, self.config[self.subcommand or "fit"].get("ckpt_path"))
        setattr(subprocess_script, "_launch_process_observer", watchdog.watch_children)  # noqa: B010 (mypy)

    def _parse_ckpt_path(self) -> None:
        """Leave YAML and command line in charge on resume; Lightning would let the checkpoint win."""


def _names(dest: str) -> list[str]:
    return [dest, dest.split(".")[-1]]


def _suggest(message: str, known: list[str]) -> str:
    unknown = re.search(r"(?:Option|Key|key|arguments?:?) '?(?:--)?([\w.]+)'?", message)
    wrong = "not accepted" in message or "nrecognized" in message or "not expected" in message
    if not (unknown and wrong) or "Did you mean" in message:
        return ""
    return did_you_mean(unknown.group(1), known)


def _fault(error: BaseException | None) -> ConfigError | None:
    """The user's fault behind an error: jsonargparse wraps what a constructor raises."""
    while error is not None and not isinstance(error, ConfigError):
        if isinstance(error, NotADirectoryError | PermissionError):
            return ConfigError(
                f"cannot use '{error.filename}': {error.strerror}. Choose another directory "
                f"(trainer.logger.init_args.save_dir, or --out)."
            )
        if isinstance(error, MisconfigurationException):
            return ConfigError(f"trainer: {error}")
        error = error.__cause__
    return error


def _help() -> str:
    lines = ["usage: python -m src.cli <verb> [options]        (<verb> --help for its options)", ""]
    lines += [f"  {verb:<10} {text}" for verb, text in (VERBS | TOOLS).items()]
    return "\n".join(lines)


def run(argv: list[str]) -> Any:
    """Dispatch one command line.

    Raises:
        ConfigError: the user asked for something that cannot be done.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return None
    if argv[0] in TOOLS:
        return importlib.import_module(MODULES[argv[0]]).main(argv[1:])
    if argv[0] not in VERBS:
        known = (VERBS | TOOLS).keys()
        raise ConfigError(f"unknown verb '{argv[0]}'.{did_you_mean(argv[0], known)}\n{_help()}")
    return PruneCLI(
        args=argv,
        parser_class=ShortErrors,
        auto_configure_optimizers=False,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
    )


def main(argv: list[str] | None = None) -> None:
    """Run, and turn a user's fault into one message and exit status 2."""
    # Lightning's advice about workers and precision is noise on the small machines the demo runs on.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # The arguments are handed over so that tests can call this; Lightning suspects a mistake.
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    watchdog.watch_parent()
    try:
        run(sys.argv[1:] if argv is None else argv)
    except Exception as error:
        if message := watchdog.explain(error):  # first: a load that runs out of memory is a fault too
            print(message, file=sys.stderr)
            raise SystemExit(1) from None
        if fault := _fault(error):
            print(f"error: {fault}", file=sys.stderr)
            raise SystemExit(2) from None
        raise


if __name__ == "__main__":
    main()
