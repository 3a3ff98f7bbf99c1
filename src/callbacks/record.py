"""Write what a stage cost (tokens, seconds, steps) to a small JSON file, which the report reads."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning import Callback, LightningModule, Trainer
from safetensors.torch import save_file

from src.data.distinct import Distinct
from src.errors import ConfigError
from src.files import misfit, whole, write_json
from src.mask import git_sha
from src.training.ranks import from_all

if TYPE_CHECKING:
    from src.training.stage import Stage


def check_path(callback: Callback, path: str | None) -> None:
    """Refuse, before anything is learned, the path of an output file that could not be written.

    Args:
        callback: the callback that has the path as an option; the message names its class.
        path: where it will write; None is not checked, as the callback then chooses a place itself.

    Raises:
        ConfigError: the path is a directory, or its directory cannot be written to.
    """
    if path is not None and (fault := misfit(path)) is not None:
        raise ConfigError(f"{type(callback).__name__}: path: '{path}' given; {fault}.")


class StageRecord(Callback):
    """Writes tokens, distinct tokens, seconds, steps and the course of a metric to a file when a stage ends.

    Figures that the stage found stand beside these, such as the KL of each size that a search learned, and
    ``metrics``, the last value of every metric that was logged.
    ``tokens`` counts a row each time it is read, ``distinct_tokens`` once. What a repair reads before the
    first step is in ``distinct_tokens`` alone. Hashes of the rows lie beside the file, in
    ``record.rows.safetensors``: with them the report counts a row once that two stages read.

    Args:
        path: the JSON file; None is ``record.json`` in the run's log directory.
        metric: logged training metric whose value at each step is written, as ``history``.
    """

    def __init__(self, path: str | None = None, metric: str = "train/kl") -> None:
        self.path, self.metric = path, metric
        self.seconds, self.history = 0.0, list[tuple[int, float]]()
        self._since = time.monotonic()

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Refuse a path that could not be written when the stage ends, and start the clock.

        Raises:
            ConfigError: it is a directory, or its directory cannot be written to.
        """
        check_path(self, self.path)
        self._since = time.monotonic() - self.seconds

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        value = trainer.callback_metrics.get(self.metric)
        if value is not None:
            self.history.append((trainer.global_step, float(value)))

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        path = Path(self.path or Path(trainer.log_dir or ".") / "record.json")  # log_dir asks all ranks
        stage = cast("Stage", module)
        read = Distinct().unite(from_all(stage.read.sample))
        if trainer.interrupted or not trainer.is_global_zero:
            return
        last = {name: float(value) for name, value in trainer.callback_metrics.items()}
        record = {
            "tokens": stage.tokens,
            "distinct_tokens": read.tokens,
            "seconds": time.monotonic() - self._since,
            "steps": trainer.global_step,
            "history": self.history,
            "metrics": {name: value for name, value in last.items() if math.isfinite(value)},
            "commit": git_sha(),
            **stage.figures,
        }
        with whole(path.with_suffix(".rows.safetensors")) as partial:
            save_file({"rows": read.sample}, partial)
        write_json(path, record)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": time.monotonic() - self._since, "history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = state_dict["seconds"]
        self.history = [tuple(point) for point in state_dict["history"]]
