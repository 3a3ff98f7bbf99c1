"""Run the verbs of Lightning on command lines of this project."""

from __future__ import annotations

from src.callbacks import ProgressLines, StopOnSignal
from src.training.arguments import PruneCLI, SaveConfig, ShortErrors
from src.training.resuming import with_settings
from src.training.trainer import Trainer


def lightning(argv: list[str]) -> PruneCLI:
    """Run fit, validate, test or predict, and return what ran it.

    Args:
        argv: the verb and its arguments.

    Raises:
        ConfigError: the user asked for something that cannot be done.
    """
    return PruneCLI(
        args=with_settings(argv),
        parser_class=ShortErrors,
        trainer_class=Trainer,
        trainer_defaults={"callbacks": [StopOnSignal(), ProgressLines()], "enable_model_summary": False},
        save_config_callback=SaveConfig,
        auto_configure_optimizers=False,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
    )
