"""One step of greedy decoding, which judging, timing and counting share.

Shapes: B rows, T tokens fed in this call, S tokens so far (cache and this call).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache

from torch import Tensor
from transformers import Cache, PreTrainedModel

from src.errors import ConfigError


def step(
    model: PreTrainedModel,
    ids_BT: Tensor,
    mask_BS: Tensor | None = None,
    cache: Cache | None = None,
) -> tuple[Tensor, Cache]:
    """Feed tokens and return the next one of every row, ``[B, 1]``, with the grown cache.

    Args:
        model: a causal language model.
        ids_BT: the tokens that the cache has not seen: the whole prompt, then one at a time.
        mask_BS: 1 for tokens, 0 for padding, over the whole sequence; None where nothing is padded.
        cache: what the call before returned; None for the prompt.

    Raises:
        ConfigError: the model has no cache.
    """
    optional: dict[str, object] = {"logits_to_keep": 1}
    if mask_BS is not None:
        positions_BS = (mask_BS.cumsum(-1) - 1).clamp(min=0)
        optional["position_ids"] = positions_BS[:, -ids_BT.shape[1] :]
    known = _parameters(type(model).forward)
    kept = "past_key_values"
    if kept not in known:  # of a state-space model, whose padding is masked in the prompt alone
        kept, mask_BS = "cache_params", mask_BS if cache is None else None
    out = model(
        input_ids=ids_BT,
        attention_mask=mask_BS,
        use_cache=True,
        **{kept: cache},
        **{key: value for key, value in optional.items() if key in known},
    )
    grown: Cache | None = getattr(out, kept, None)
    if grown is None:
        raise ConfigError(
            f"--model: a '{model.config.model_type}' gives back no cache of what it has read, so it "
            f"can be neither decoded nor timed here. evaluate --no-exact-match still judges it."
        )
    return out.logits[:, -1].argmax(-1, keepdim=True), grown


@lru_cache
def _parameters(forward: Callable[..., object]) -> frozenset[str]:
    """Return the names of ``forward``'s parameters; a model with ALiBi, say, has no ``position_ids``."""
    return frozenset(inspect.signature(forward).parameters)
