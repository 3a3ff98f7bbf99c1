"""Write the cost of a stage to a small JSON file, which the report reads."""

from __future__ import annotations

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
    """Refuse, before anything is learned, a path of a callback that can be no file.

    Raises:
        ConfigError: says why.
    """
    if path is not None and (fault := misfit(path)) is not None:
        raise ConfigError(f"{type(callback).__name__}: path: '{path}' given; {fault}.")


class StageRecord(Callback):
    """Writes ``{"tokens", "distinct_tokens", "seconds", "steps", "history"}`` when a stage ends.

    What the stage itself found stands beside these, such as the KL of each budget of a search. Tokens are
    those processed, each time that a row is read. Distinct tokens are those of the rows, read once or often;
    the names of the rows lie beside it in ``record.rows.safetensors``, so that rows that two stages share
    count once.

    Args:
        path: the JSON file; None is ``record.json`` in the run's log directory.
        metric: logged training metric whose course is kept.
    """

    def __init__(self, path: str | None = None, metric: str = "train/kl") -> None:
        self.path, self.metric = path, metric
        self.seconds, self.history = 0.0, list[tuple[int, float]]()
        self._since = time.monotonic()

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Refuse a path that the end of the stage could not write.

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
        record = {
            "tokens": stage.tokens,
            "distinct_tokens": read.tokens,
            "seconds": time.monotonic() - self._since,
            "steps": trainer.global_step,
            "history": self.history,
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
