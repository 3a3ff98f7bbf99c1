"""What bitsandbytes does wrong with packed weights on a CPU."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from src.errors import ConfigError


def settle(model: PreTrainedModel, name: str) -> None:
    """Keep packed weights as they are, and refuse those that bitsandbytes (0.50) would misread.

    Blocks of 64 weights share a scale, across the ends of rows. On a CPU they are read as if each row began a
    block, which is wrong unless the rows are whole blocks.

    Raises:
        ConfigError: 4-bit weights lie on a CPU in rows that are no whole blocks.
    """
    module: Any
    for path, module in model.named_modules():
        # On some CPUs bitsandbytes would repack weights for a kernel that passes no gradient on.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            weight = module.weight
            if weight.device.type == "cpu" and module.in_features % weight.quant_state.blocksize:
                raise ConfigError(
                    f"quantize: bitsandbytes misreads 4-bit weights in rows of {module.in_features} ({path} "
                    f"of '{name}') on a CPU, where rows must be multiples of {weight.quant_state.blocksize}. "
                    f"Use int8."
                )
