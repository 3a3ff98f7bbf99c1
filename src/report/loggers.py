"""Send a run to further loggers beside its own: metrics, settings, the picture of its mask, its results.

``trainer.logger`` names the run's directory, so it stays one that does; what is added here has no say in it.
"""

from __future__ import annotations

import io
import os
from functools import singledispatch
from pathlib import Path

import yaml
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure
from PIL import Image

from src.errors import ConfigError
from src.mask import Mask
from src.report.figures import mask_strip
from src.report.run import figures_of

RESULTS = ("config.yaml", "mask.json", "record.json", "gates.json")
"""Files of a run that go along, where a logger keeps files."""
# Without it MLflow wants a data base in place of a directory.
os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")


class AlsoLog(Callback):
    """Logs a run to one more logger.

    The logger receives every metric; before the first step the settings of ``config.yaml``; and at the end,
    as ``final/...``, the figures of the mask and of ``record.json``, the picture of the mask, and the files
    :data:`RESULTS`.

    Args:
        logger: the logger, such as Lightning's ``WandbLogger``.
    """

    def __init__(self, logger: Logger) -> None:
        self.logger = logger
        self._directory = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Join the run's loggers.

        Raises:
            ConfigError: the run has none, so that this one would decide where its files go.
        """
        if not trainer.loggers:
            raise ConfigError(
                "trainer.logger: none given, and AlsoLog logs beside one. Name it, such as "
                "lightning.pytorch.loggers.CSVLogger."
            )
        if self.logger not in trainer.loggers:
            trainer.loggers = [*trainer.loggers, self.logger]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._directory = Path(trainer.log_dir or ".")  # asks all ranks
        noted = self._directory / "config.yaml"
        if trainer.is_global_zero:
            settings = yaml.safe_load(noted.read_text()) if noted.is_file() else {}
            self.logger.log_hyperparams({"run": str(self._directory), **settings})

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log what the run has found, once all callbacks have written it."""
        if stage != "fit" or not trainer.is_global_zero or trainer.interrupted:
            return
        found, mask = figures_of(self._directory), self._directory / "mask.json"
        if mask.is_file():
            show(self.logger, mask_strip(Mask.load(mask)), "mask", trainer.global_step)
        self.logger.log_metrics({f"final/{key}": value for key, value in found.items()}, trainer.global_step)
        for name in RESULTS:
            if (self._directory / name).is_file():
                keep(self.logger, self._directory / name)


@singledispatch
def show(logger: Logger, figure: Figure, name: str, step: int) -> None:
    """Show a figure in a logger, if it can show one: a file of numbers cannot."""


@show.register
def _(logger: TensorBoardLogger, figure: Figure, name: str, step: int) -> None:
    logger.experiment.add_figure(name, figure, step)


@show.register
def _(logger: WandbLogger, figure: Figure, name: str, step: int) -> None:
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    logger.log_image(name, [Image.open(stream)], step)


@show.register
def _(logger: MLFlowLogger, figure: Figure, name: str, step: int) -> None:
    logger.experiment.log_figure(logger.run_id, figure, f"{name}.png")


@singledispatch
def keep(logger: Logger, file: Path) -> None:
    """Keep a file in a logger, if it keeps files: those that write to the disk have it beside them."""


@keep.register
def _(logger: WandbLogger, file: Path) -> None:
    above = str(file.parent.parent)  # a file config.yaml of its own lies where the run's would
    logger.experiment.save(str(file), base_path=above, policy="now")


@keep.register
def _(logger: MLFlowLogger, file: Path) -> None:
    logger.experiment.log_artifact(logger.run_id, str(file))
