"""What prompts start from: sets of real rows, and their embeddings.

Shapes: M rows of a set, T positions, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from src.data.batches import Padded
from src.data.columns import Columns
from src.data.judging import judged, read_rows
from src.errors import ConfigError
from src.models.head import TOLERANCE, OutputHead

KEY = "model.rows"


def row_sets(
    tokenizer: PreTrainedTokenizerBase, path: str | None, sets: int, size: int, length: int
) -> list[tuple[Tensor, Tensor]]:
    """Return the first rows of a file as sets of M: tokens and mask, ``[M, T]``, padded on the right.

    Args:
        tokenizer: of the model.
        path: the file, or a Hub id.
        sets: number of sets.
        size: rows in each.
        length: tokens after which a row is cut off.

    Raises:
        ConfigError: there are too few rows.
    """
    if path is None:
        raise ConfigError(f"{KEY}: null given, and this run reads no text that rows could be taken from.")
    rows = judged(tokenizer, read_rows(path, sets * size), Columns(), "all", length).rows
    if len(rows) < sets * size:
        raise ConfigError(
            f"{KEY}: '{path}' gives {len(rows)} rows of two tokens or more, and model.starts {sets} times "
            f"model.prompts {size} are asked. Give more rows, or ask for fewer."
        )
    batch = Padded(len(rows), length, tokenizer.pad_token_id or 0).collate([[row] for row in rows])
    return list(zip(*(batch[key].split(size) for key in ("input_ids", "attention_mask")), strict=True))


@torch.no_grad()
def embedded(head: OutputHead, ids_MT: Tensor, mask_MT: Tensor) -> Tensor:
    """Return the embeddings ``[M, T, H]`` that a model reads as it does these tokens.

    Raises:
        ConfigError: it does not: its layers read the tokens themselves, too.
    """
    embeds_MTH: Tensor = head.model.get_input_embeddings()(ids_MT)
    by_tokens = head.hidden({"input_ids": ids_MT, "attention_mask": mask_MT})
    by_embeds = head.hidden({"inputs_embeds": embeds_MTH, "attention_mask": mask_MT})
    gap = (by_tokens - by_embeds)[mask_MT.bool()].abs().max()
    if not gap <= TOLERANCE["float32"] * by_tokens.abs().max():
        raise ConfigError(
            f"model: a '{head.model.config.model_type}' reads tokens otherwise than their embeddings, so "
            f"soft prompts cannot take their place. Use real rows."
        )
    return embeds_MTH
