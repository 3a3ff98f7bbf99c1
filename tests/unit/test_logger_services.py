"""What a service is given, in its own form, whether or not its package is installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure

from src.mask import Mask
from src.report import loggers
from src.report.figures import mask_strip

Curves = dict[str, dict[int, float]]
"""Values by metric and step."""
EXTRAS = {"wandb": "wandb", "mlflow": "mlflow"}
INSTALLED = ["csv", "tensorboard", *(name for name, package in EXTRAS.items() if find_spec(package))]


class Recorded:
    """Stands where a service's client is, and notes what it is given."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *given, **named: self.calls.append((name, given, named))


def made(kind: type[Logger], client: Recorded) -> Any:
    """A logger of a service whose package need not be installed."""
    own = {
        "experiment": property(lambda _: client),
        "run_id": "r",
        "log_image": staticmethod(client.log_image),
    }
    return object.__new__(type(kind.__name__, (kind,), own))


def test_services_get_the_picture_as_pixels_or_as_a_figure_and_files_by_their_path(tmp_path: Path) -> None:
    figure, file = mask_strip(Mask("m", 4, (0, 1, 3), "x")), tmp_path / "mask.json"
    for kind in (WandbLogger, MLFlowLogger, TensorBoardLogger, CSVLogger):
        client = Recorded()
        logger = made(kind, client)
        loggers.show(logger, figure, "mask", 7)
        loggers.keep(logger, file)
        if kind is WandbLogger:
            (name, (key, (image,), step), _), (saved, (path,), named) = client.calls
            assert (name, key, step, saved, path) == ("log_image", "mask", 7, "save", str(file))
            assert named["base_path"] == str(tmp_path.parent)
            assert len(np.unique(np.asarray(image))) > 9, "there is something to see"
        elif kind is MLFlowLogger:
            assert [call[0] for call in client.calls] == ["log_figure", "log_artifact"]
            assert client.calls[0][1] == ("r", figure, "mask.png")
            assert client.calls[1][1] == ("r", str(file))
        else:
            assert [call[:2] for call in client.calls] == [("add_figure", ("mask", figure, 7))] * (
                kind is TensorBoardLogger
            )
    assert isinstance(figure, Figure)
