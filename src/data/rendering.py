"""Render chats as text by a tokenizer's template, with a fixed date and fixed random seeds.

A template may ask for today's date (``strftime_now``) and for random choices (the filter ``random``,
``lipsum``). If the clock and the global random state gave them, rows would change overnight, and a resumed
run would read other rows than before. Here a rendering is a function of chat, template and date alone.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import date
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from src.errors import ConfigError
from src.training.identity import changes

Turn = dict[str, Any]
_WORDS = {
    "day": "data.init_args.today",
    "template": "the chat template (its fingerprint)",
    "rules": "the way the tokenizer divides text (its fingerprint)",
}


class Rendering:
    """Renders chats as a tokenizer's template says, on one day.

    Args:
        tokenizer: owner of the template.
        day: date that the template takes for today, at midnight; None is the present one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, day: date | None = None) -> None:
        self.tokenizer, self.day = tokenizer, day or date.today()

    def __call__(self, turns: list[Turn], seed: str, **inputs: Any) -> str:
        """Return the text of a chat.

        Args:
            turns: its messages.
            seed: text that seeds the random choices which the template makes.
            inputs: further variables of the template, such as ``tools``.
        """
        template = self.tokenizer.get_chat_template(tools=inputs.get("tools"))
        # The library reads the clock at each call. Its own name in the compiled template is all it offers.
        _compile_jinja_template(template).globals["strftime_now"] = self.day.strftime
        with _chance(seed) if re.search("random|lipsum", template) else nullcontext():
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, **inputs))

    @property
    def record(self) -> dict[str, str | None]:
        """What a text depends on beside its row: the day, and fingerprints of template and tokenizer."""
        core = getattr(self.tokenizer, "backend_tokenizer", None)
        rules = json.loads(core.to_str()) if core is not None else {}
        lasting = {key: rule for key, rule in rules.items() if key not in ("truncation", "padding")}
        return {
            "day": self.day.isoformat(),
            "template": _digest(getattr(self.tokenizer, "chat_template", None)),
            "rules": _digest(lasting),
        }

    def resume(self, was: dict[str, Any], named: date | None) -> None:
        """Take over the day on which a resumed run rendered its chats, and warn of each other change.

        Args:
            was: :attr:`record` of the run, from its checkpoint.
            named: the day that the user set, which wins; None if the user set none.
        """
        self.day = named or date.fromisoformat(was["day"])
        for change in changes(was, self.record):
            rank_zero_warn(
                f"data: {_WORDS[change.key]} was {change.was} in the checkpoint and is now {change.now}; "
                "rows of the block under way may be repeated or left out, those after it read differently."
            )


def parse_day(text: str | None) -> date | None:
    """Return the date that a user writes as 2026-01-31; None if the user writes none.

    Raises:
        ConfigError: it is no date.
    """
    try:
        return date.fromisoformat(text) if text is not None else None
    except (ValueError, TypeError) as e:
        raise ConfigError(f"data.today: {text!r} given; accepted: a day such as 2026-01-31.") from e


@contextmanager
def _chance(seed: str) -> Iterator[None]:
    """Seed Python's own generator, which templates draw from, for the block; restore it afterwards."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
