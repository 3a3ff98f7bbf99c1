"""Measure whether a model keeps the documents of a packed row apart."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from src.errors import ConfigError

_TOKENS = 8


@torch.no_grad()
def check_boundaries(model: PreTrainedModel) -> None:
    """Refuse a model that lets the documents of a packed row see each other.

    Its logits on the last document of a packed row are compared with those on the same document alone. A
    model fails that carries a state across tokens (Mamba, convolutions), that takes its positions
    from the attention mask (OPT), or whose attention implementation reads packed positions only in
    batches of one row.

    Raises:
        ConfigError: the logits differ by more than rounding.
    """
    ids = torch.arange(3, 3 + 2 * _TOKENS, device=model.device) % model.config.get_text_config().vocab_size
    positions = torch.arange(_TOKENS, device=model.device)
    training = model.training
    model.eval()
    alone = model(input_ids=ids[None, _TOKENS:], position_ids=positions[None], use_cache=False).logits
    twice = {"input_ids": ids.expand(2, -1), "position_ids": positions.repeat(2).expand(2, -1)}
    packed = model(**twice, use_cache=False).logits[:, _TOKENS:]
    model.train(training)
    error = float((packed - alone).norm() / (alone.expand_as(packed).norm()))
    if not error < (1e-2 if alone.dtype == torch.float32 else 5e-2):
        raise ConfigError(
            f"data.packing: {type(model).__name__} ({model.config._attn_implementation}) does not "
            f"keep the documents of a packed row apart: its logits change by {error:.0%}. Set "
            f"data.packing to 'padded', or choose another attention implementation."
        )
