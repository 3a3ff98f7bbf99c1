"""Check that models mean the same by a token's id, and fit logits of one to the vocabulary of another.

A teacher of the student's family often has the same tokenizer and a head of another width, because models of
other sizes pad it to other widths. The student's width is what counts: ids that it lacks are left out of the
teacher's distribution, and ids that the teacher lacks get no probability.

Shapes: V vocabulary.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import cast

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from src.errors import ConfigError
from src.models.loading import load_tokenizer

_SAMPLE = "Äpfel, 3 of 1,234.5 BIRDS don't\tsing;  naïve 漢字 и 🙂\n\n    def f(x_1): return {x: '</a>'}\r\n"
"""Text at which tokenizers part that divide words, digits, blanks, capitals or scripts in another way."""

_ROLES = [f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
"""Names of the special tokens that a tokenizer itself puts into texts."""

_FILES = ("tokenizer*", "vocab.*", "*.model", "*.tiktoken")


def within(logits: Tensor, vocabulary: int) -> Tensor:
    """Return logits ``[..., V]`` as ``[..., vocabulary]``: cut off, or padded with minus infinity."""
    missing = vocabulary - logits.shape[-1]
    return F.pad(logits, (0, missing), value=-math.inf) if missing > 0 else logits[..., :vocabulary]


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    name: str,
    revision: str | None = None,
    key: str = "data.tokenizer",
) -> None:
    """Refuse a model that lacks tokens of a tokenizer, or means other tokens by their ids.

    A directory without a tokenizer is trusted, with a warning, if the model's vocabulary is large enough. A
    special token beyond the vocabulary is no fault if neither the tokenizer, as it does padding, nor its chat
    template puts it into texts: a family's tokenizer may have tokens for images, which its text models lack
    (Gemma 3).

    Args:
        tokenizer: gives the ids that the model reads.
        model: the model.
        name: its Hub id or directory, where its own tokenizer may lie.
        revision: its Hub revision.
        key: the setting to blame.

    Raises:
        ConfigError: names what differs.
    """
    highest = max({*tokenizer.get_vocab().values()} - _unwritten(tokenizer), default=-1)
    size = cast(Tensor, model.get_input_embeddings().weight).shape[0]
    mend = "Leave data.tokenizer out to use the model's own, or choose a teacher with the same tokenizer."
    if highest >= size:
        raise ConfigError(
            f"{key}: tokens go up to {highest}, but the vocabulary of '{name}' has {size}. {mend}"
        )
    if tokenizer.name_or_path == name:
        return
    if Path(name).is_dir() and not any(any(Path(name).glob(file)) for file in _FILES):
        rank_zero_warn(f"{key}: '{name}' has no tokenizer; its ids are taken to mean what the data's do.")
        return
    if difference := _difference(tokenizer, load_tokenizer(name, revision)):
        data = f"the data, '{tokenizer.name_or_path}'"
        raise ConfigError(f"{key}: '{name}' has another tokenizer than {data}: {difference}. {mend}")


def _unwritten(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids of special tokens that neither the tokenizer nor its chat template puts into texts."""
    template = str(tokenizer.chat_template)
    written = {tokenizer.special_tokens_map.get(role) for role in _ROLES}
    special = {at: str(token) for at, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(at for at, text in special.items() if text not in written and text not in template)


def _difference(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> str | None:
    """Say in what another tokenizer differs; None if in nothing. Tokens that ours lacks do not count."""
    ids = theirs.get_vocab()
    padding = None if ours.pad_token == ours.eos_token else ours.pad_token  # never looked at
    other = [
        (token, at) for token, at in ours.get_vocab().items() if ids.get(token) != at and token != padding
    ]
    if other:
        token, at = min(other, key=lambda pair: pair[1])
        there = f"is id {ids[token]}" if token in ids else "is none"
        more = f" (and {len(other) - 1} more)" if len(other) > 1 else ""
        return f"token '{token}' of id {at} {there} there{more}"
    pieces = [t(_SAMPLE, add_special_tokens=False).input_ids for t in (ours, theirs)]
    return None if pieces[0] == pieces[1] else "the tokens are the same, but it divides text in another way"
