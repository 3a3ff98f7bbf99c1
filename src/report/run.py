"""Read what the stages have written into the directory of a run.

=======================  ===========================================================================
``search/mask.json``     the search, as it ends (needed)
``search/record.json``   its tokens, seconds, losses, and masks by size (``StageRecord``)
``search/gates.json``    its keep probabilities, one row of L numbers a step (``SearchMonitor``)
``recover/record.json``  tokens, seconds and losses of the recovery (``StageRecord``)
``evaluate.json``        ``evaluate --teacher T --model RUN/cut RUN/recovered ... --out`` (needed)
``tasks.json``           ``evaluate --teacher T --model RUN/cut RUN/recovered --tasks ... --out``
``benchmark.json``       ``benchmark --baseline T --model RUN/cut RUN/recovered ... --out``
``answers/NAME.jsonl``   ``generate --model NAME --prompts FILE --out``: of ``teacher`` and each model
``training.json``        in the teacher's own directory: tokens and seconds of its training
=======================  ===========================================================================
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from src.errors import ConfigError
from src.files import read_json
from src.mask import Mask
from src.report.answers import Answers, read_answers

Record = dict[str, Any]
STAGES = ("search", "recover")
"""Stages that train, each with a directory of its name in that of the run."""


@dataclass(frozen=True)
class Run:
    """Holds the files that the stages left in a run's directory; what is absent is empty.

    Attributes:
        mask: the mask that the search learned.
        evaluate, tasks, training, search, gates, recover, benchmark: content of the files in the table above.
        answers: prompts and answers of each model that ``generate`` has asked.
        rows: of ``search`` and ``recover``, hash and number of tokens of each row that the stage has read.
    """

    mask: Mask
    evaluate: Record
    tasks: Record
    training: Record
    search: Record
    gates: Record
    recover: Record
    benchmark: Record
    answers: dict[str, Answers]
    rows: dict[str, Tensor]

    @classmethod
    def read(cls, directory: Path) -> Run:
        """Read the files of a run.

        Raises:
            ConfigError: a file that is needed is missing, or one is not JSON.
        """
        evaluate = read_record(directory / "evaluate.json")
        if not (evaluate.get("teacher") and evaluate.get("models")):
            raise ConfigError(
                f"--run: '{directory}' holds no evaluate.json with a teacher. Write it with: python -m "
                f"src.cli evaluate --teacher DIR --model DIR --data FILE --out "
                f"{shlex.quote(str(directory / 'evaluate.json'))}"
            )
        return cls(
            mask=Mask.load(directory / "search" / "mask.json"),
            evaluate=evaluate,
            tasks=read_record(directory / "tasks.json"),
            training=read_record(Path(evaluate["teacher"]["path"]) / "training.json"),
            search=read_record(directory / "search" / "record.json"),
            gates=read_record(directory / "search" / "gates.json"),
            recover=read_record(directory / "recover" / "record.json"),
            benchmark=read_record(directory / "benchmark.json"),
            answers=read_answers(directory / "answers"),
            rows=read_rows({stage: directory / stage for stage in STAGES}),
        )


def read_record(path: Path) -> Record:
    """Return the object in a JSON file of a run; empty if there is no such file.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        content = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise ConfigError(f"run: cannot read '{path}': {e}") from e
    if not isinstance(content, dict):
        raise ConfigError(f"run: '{path}' holds a {type(content).__name__}; expected an object.")
    return content


def figures_of(stage: Path) -> dict[str, float]:
    """Return the figures of a stage's directory by their names: those of its record, and those of its mask.

    Raises:
        ConfigError: a file cannot be read.
    """
    record, mask = read_record(stage / "record.json"), stage / "mask.json"
    found = {key: value for key, value in record.items() if isinstance(value, int | float)}
    return found | (Mask.load(mask).metrics if mask.is_file() else {})


def read_rows(stages: Mapping[str, Path]) -> dict[str, Tensor]:
    """Return hashes of the rows that stages have read, by the stage's name, of those that noted them.

    Args:
        stages: directory of each stage, by its name.

    Raises:
        ConfigError: a file cannot be read.
    """
    files = {stage: directory / "record.rows.safetensors" for stage, directory in stages.items()}
    try:
        return {stage: load_file(file)["rows"] for stage, file in files.items() if file.exists()}
    except (OSError, KeyError, SafetensorError) as e:
        raise ConfigError(f"run: cannot read the rows of a stage: {e}") from e


@contextmanager
def as_written(directory: Path) -> Iterator[None]:
    """Turn the errors that a foreign file causes in the block into one message.

    Raises:
        ConfigError: the files of ``directory`` are not as the stages write them.
    """
    try:
        yield
    except ConfigError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
        raise ConfigError(
            f"run: the files of '{directory}' are not as the stages write them ({type(e).__name__}: {e}). "
            f"evaluate.json, tasks.json and benchmark.json are written again by evaluate --out and benchmark "
            f"--out; answers by generate --out; config.yaml, record.json and mask.json by the stage itself."
        ) from e
