"""Decode greedily with a KV cache, in one loop that evaluation and benchmark share.

``generate()`` of transformers merges the checkpoint's own sampling settings (temperature, repetition
penalty) into what it is asked, and costs several times a small model's step in bookkeeping. Judging and
timing need neither: this loop is an argmax and one forward pass for each token.

Shapes: B rows, S tokens so far (cache and this call).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from src.errors import ConfigError
from src.models.decoding import step
from src.training.progress import track

_SHRINK = 0.8
"""Rows that are done leave the batch when at most this share is still going: leaving copies the cache."""


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids of tokens that end a text: the tokenizer's, and those in the generation config."""
    declared = getattr(model.generation_config, "eos_token_id", None)
    declared = declared if isinstance(declared, list) else [declared]
    return frozenset(i for i in (*declared, tokenizer.eos_token_id) if i is not None)


def new_tokens(prompts: Sequence[Sequence[int]], positions: int, asked: int | None, default: int) -> int:
    """Return how many new tokens to allow, such that the longest prompt and its continuation have positions.

    Args:
        prompts: token lists.
        positions: tokens that prompt and continuation may have together.
        asked: number of new tokens that the user asks for; None if the user does not say.
        default: number to allow in that case, or fewer if the longest prompt leaves fewer positions.

    Raises:
        ConfigError: the longest prompt leaves fewer positions than asked for, or none.
    """
    longest = max(map(len, prompts))
    room = positions - longest + 1  # the last token is not fed
    if room < (asked or 1):
        raise ConfigError(
            f"--max-new-tokens: the longest prompt has {longest} tokens, with {asked or 1} new ones more "
            f"than the {positions} places in the table of positions. Lower it, shorten the prompts, or leave "
            f"answers out (evaluate: --no-exact-match)."
        )
    return asked or min(default, room)


@torch.inference_mode()
def greedy(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: frozenset[int],
    batch_size: int = 128,
    pad: int = 0,
) -> list[list[int]]:
    """Continue every prompt greedily; return the new tokens of each, without the stop token.

    Prompts of similar length share a batch, padded on the left; rows that are done leave the batch.

    Args:
        model: a causal language model in eval mode.
        prompts: token lists, none empty.
        max_new_tokens: largest number of tokens of a continuation.
        stop: tokens that end a continuation.
        batch_size: prompts decoded together.
        pad: any token; it is masked.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts: list[list[int]] = [[] for _ in prompts]
    for start in track(range(0, len(order), batch_size), "batches of answers"):
        rows = order[start : start + batch_size]
        batch = _greedy_batch(model, [prompts[i] for i in rows], max_new_tokens, stop, pad)
        for i, text in zip(rows, batch, strict=True):
            texts[i] = text
    return texts


def _greedy_batch(
    model: PreTrainedModel,
    prompts: list[Sequence[int]],
    max_new_tokens: int,
    stop: frozenset[int],
    pad: int,
) -> list[list[int]]:
    width = max(len(prompt) for prompt in prompts)
    padding = [width - len(prompt) for prompt in prompts]
    ids_BT = torch.tensor([[pad] * n + list(p) for n, p in zip(padding, prompts, strict=True)])
    mask_BS = torch.tensor([[0] * n + [1] * (width - n) for n in padding])
    ids_BT, mask_BS = ids_BT.to(model.device), mask_BS.to(model.device)
    texts: list[list[int]] = [[] for _ in prompts]
    rows, done, cache = list(range(len(prompts))), set[int](), None
    for _ in range(max_new_tokens):
        ids_BT, cache = step(model, ids_BT, mask_BS, cache)
        for row, token in zip(rows, ids_BT[:, 0].tolist(), strict=True):
            if token in stop:
                done.add(row)
            if row not in done:
                texts[row].append(token)
        left = [at for at, row in enumerate(rows) if row not in done]
        if not left:
            break
        if len(left) <= _SHRINK * len(rows):
            rows, index = [rows[at] for at in left], torch.tensor(left, device=ids_BT.device)
            ids_BT, mask_BS = ids_BT[index], mask_BS[index]
            cache.reorder_cache(cast(torch.LongTensor, index))
        mask_BS = torch.cat([mask_BS, mask_BS.new_ones(len(rows), 1)], dim=1)
    return texts
