"""Choose settings for a model of any size, each with a reason: a measurement, the machine, or a rule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from src.errors import ConfigError
from src.models.costs import NEW, PROMPT, parameters
from src.models.cut_config import weightless
from src.models.loading import load_config, longest_row
from src.models.positions import positions_of
from src.plan.advice import Advice, advise
from src.plan.devices import FILE, device, this_machine
from src.plan.experiment import Experiment
from src.plan.planner import Planner
from src.shorten.text import LONGEST, Text

SEARCH, RECOVER = "configs/search/gumbel_topk.yaml", "configs/recover/entropy_kd.yaml"
RATES = {1.6e6: 7e-4, 1.35e8: 3e-4, 7e9: 1e-5}
"""Learning rates by number of weights: two that were measured (docs/public_model.md), one that is usual."""
AGAIN = RATES | {1.6e6: 1e-3}
"""The same where a text is read again and again, which was measured of the first."""
PASSES, STEPS = 8, 750
"""Times that a small corpus is read, and the steps that this takes."""
HIDDEN_STATES = "[{term: {class_path: src.losses.HiddenStates}, weight: 10.0}]"
"""The further term of a recovery that reads its text again."""
HELD = 2**31
"""Bytes of a step up to which the whole distribution is learned: four for each token of the vocabulary."""
LARGE = 5e7
"""Weights from which bf16 pays on a CPU that multiplies it fast; it was measured at 135 M."""


@dataclass(frozen=True)
class Choice:
    """Holds one setting that was chosen.

    Attributes:
        stage: ``search`` or ``recover``.
        option: name of the option of ``fit``.
        value: its value.
        reason: why this value.
    """

    stage: str
    option: str
    value: Any
    reason: str

    @property
    def argv(self) -> tuple[str, ...]:
        """The setting as arguments of a command line."""
        return f"--{self.option}", str(self.value)


def weights(model: str) -> int:
    """Return the number of weights of a model; only its config is read."""
    return parameters(weightless(load_config(model)))


def bf16_is_fast() -> bool:
    """Return whether this machine's CPU multiplies bf16 at least 1.5 times as fast as float32."""
    speed = device("cpu").tflops
    return speed["bfloat16"] >= 1.5 * speed["float32"]


def choose(model: str, text: Text, tokens: int | None) -> Iterator[Choice]:
    """Yield the settings that follow from the model, the text and the machine.

    Args:
        model: Hub id or directory.
        text: figures of the training text.
        tokens: tokens that the recovery processes, if the user says so; None is by the size of the text.
    """
    count = weights(model)
    longest = min(LONGEST, longest_row(model) or LONGEST)
    length = min(longest, -(-text.length // 64) * 64)
    why = f"95 % of {text.documents:,} documents have at most {text.length} tokens"
    rows = max(1, 32 * 256 // length)
    for stage in ("search", "recover"):
        yield Choice(stage, "data.init_args.max_length", length, why)
    yield Choice("search", "data.init_args.batch_size", max(1, rows // 2), "about 4 k tokens a step")
    if torch.cuda.is_available() or (count >= LARGE and bf16_is_fast()):
        yield Choice("search", "model.init_args.dtype", "bfloat16", "fast here; the weights do not move")
        yield Choice(
            "recover", "model.init_args.teacher.init_args.dtype", "bfloat16", "the same of the teacher"
        )
        yield Choice("recover", "trainer.precision", "bf16-mixed", "fast here; the weights stay float32")
    budget = tokens or PASSES * text.tokens
    seen = "of text" if text.whole else f"of its first {text.documents:,} documents; --tokens for more"
    read = "as --tokens says" if tokens else f"{PASSES} x the {text.tokens / 1e3:,.0f} k tokens {seen}"
    share, why = rows, "about 8 k tokens a step"
    if again := text.whole and budget > 1.5 * text.tokens:
        states = "the text is read again and again, and the parent's streams help then (docs/recovery.md)"
        yield Choice("recover", "model.init_args.terms", HIDDEN_STATES, states)
        share = max(1, min(rows, round(budget / text.tokens * text.documents / STEPS)))
        why = f"about {STEPS} steps, if they are not more than 8 k tokens each"
    yield Choice("recover", "data.init_args.batch_size", share, why)
    if 4 * share * length * load_config(model).get_text_config().vocab_size <= HELD:
        nearer = "all of the parent's tokens, not its ten likeliest: 0.02 nats nearer (docs/public_model.md)"
        yield Choice("recover", "model.init_args.distillation.init_args.k", "null", nearer)
    rule = "by weights: between those measured at 1.6 M and 135 M, and the usual 1e-5 of 7 B"
    yield Choice("recover", "model.init_args.optimizer.init_args.lr", _rate(count, again), rule)
    steps = max(20, round(budget / (share * min(length, text.tokens / text.documents))))
    yield Choice("recover", "trainer.max_steps", steps, f"about {budget / 1e6:,.3g} M tokens: {read}")
    every = max(5, steps // 5)
    yield Choice("recover", "trainer.val_check_interval", every, "five looks at the held-out rows")


def _rate(count: int, again: bool) -> float:
    """Return the learning rate for ``count`` weights: on a line between known neighbours, in logarithms."""
    known = np.log([*(AGAIN if again else RATES).items()])
    return float(f"{np.exp(np.interp(np.log(count), *known.T)):.1e}")


def benchmark_lengths(model: str) -> tuple[str, ...]:
    """Return the options of ``benchmark`` by which a model of few positions is timed: as many as it has."""
    longest = positions_of(load_config(model))
    if longest is None or longest >= PROMPT + NEW:
        return ()
    new = max(1, longest * NEW // (PROMPT + NEW))
    return "--prompt-tokens", str(longest - new), "--new-tokens", str(new)


def fitted(experiment: Experiment) -> tuple[Advice | None, str]:
    """Ask the planner for the simplest way to run a stage on this machine.

    It is a way without a cache of the parent's signal, because no stage writes one.

    Args:
        experiment: the stage's ``fit``, as parsed.

    Returns:
        The planner's advice, None if it does not know this GPU; and the name of the device.

    Raises:
        ConfigError: no way to run the stage fits this machine, or one does whose engine is not installed.
    """
    name = this_machine()
    if name is None:
        return None, f"{torch.cuda.get_device_name()}, of which {FILE.name} knows nothing"
    advice = advise(Planner(experiment, device(name)), disk=0)
    if advice.best is None:
        raise ConfigError(f"--model: {advice.reason}")
    if advice.best.setting.offload and find_spec("deepspeed") is None:
        raise ConfigError(
            f"--model: {experiment.stage}: only DeepSpeed, with the optimiser's state in the host's memory, "
            f"has room, and it is not installed: pip install -e '.[deepspeed]', or give shorter rows, "
            f"--{experiment.stage} '--data.init_args.max_length 512'."
        )
    return advice, name
