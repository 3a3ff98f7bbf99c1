"""The fresh process of a proof: it loads an exported directory, and must reproduce a recorded run.

The parent with hard gates (or the recovered student) is observed in memory (:mod:`src.export.observe`). This
process has nothing but the directory and that observation. It loads the directory with stock
``AutoModelForCausalLM``, without remote code, and observes it by the same runs. On a CPU both must agree to
the last bit, in any type; on a GPU within the tolerance of the type.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from src.export.observe import Finding, Observation, compare, observe
from src.models.claims import is_tied
from src.models.layers import num_layers

PROOF_TEXT = "Layer 7 of 12: the cat sat on the mat,\n\tdidn't it? 1+1=2."


@dataclass(frozen=True)
class Reference:
    """What an exported directory must reproduce: logits and a generation, and how they are made.

    Attributes:
        expected: observation of the model in memory.
        ids_BT: the tokens that it was run on.
        weights: how many numbers the export must hold, tied ones counted once, as predicted from the parent.
        layers: number of layers.
        tied: whether input and output embeddings are one tensor.
        text_ids: tokens of :data:`PROOF_TEXT`; None if the parent has no tokenizer.
        chat_template: template of the parent's tokenizer.
        dtype: type to compute in.
        attention: attention implementation.
        device: device of the computation.
        threads: CPU threads; sums depend on their number.
    """

    expected: Observation
    ids_BT: Tensor
    weights: int
    layers: int
    tied: bool
    text_ids: list[int] | None = None
    chat_template: str | None = None
    dtype: str = "float32"
    attention: dict[str, str | None] | None = None
    device: str = "cpu"
    threads: int = 1

    def save(self, path: Path) -> None:
        """Write tensors and settings to one safetensors file."""
        settings = {k: v for k, v in vars(self).items() if k not in ("expected", "ids_BT")}
        save_file({**self.expected, "ids_BT": self.ids_BT}, path, {"settings": json.dumps(settings)})

    @classmethod
    def load(cls, path: Path) -> Reference:
        """Read what :meth:`save` wrote."""
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            settings = json.loads(file.metadata()["settings"])
        return cls(ids_BT=tensors.pop("ids_BT"), expected=tensors, **settings)


def verify(directory: Path, reference: Reference) -> list[Finding]:
    """Load an exported directory as any user would and compare it with the reference; return the findings."""
    torch.set_num_threads(reference.threads)
    read = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=getattr(torch, reference.dtype),
        attn_implementation=reference.attention,
        local_files_only=True,
        output_loading_info=True,
        trust_remote_code=False,
    )
    model, info = cast(tuple[PreTrainedModel, dict[str, Any]], read)  # as output_loading_info asks
    nn.Module.to(model.eval(), reference.device)
    wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    stored, loaded = _stored_weights(directory), unique_weights(model.state_dict())
    tied, depth = is_tied(model), num_layers(model.config)
    findings = [
        Finding("no missing, unexpected or mismatched keys", not wrong, str(wrong or "none")),
        Finding(
            "weights as predicted, nothing else stored",
            stored == loaded == reference.weights,
            f"{stored:,} stored, {loaded:,} loaded, {reference.weights:,} predicted",
        ),
        Finding("layers", depth == reference.layers, str(depth)),
        Finding("embeddings tied as in the original", tied == reference.tied, "tied" if tied else "not tied"),
    ]
    if reference.text_ids is not None:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        same = tokenizer(PROOF_TEXT).input_ids == reference.text_ids
        same &= tokenizer.chat_template == reference.chat_template
        findings.append(Finding("tokenizer and chat template", same, "equal" if same else "differ"))
    exact = reference.device == "cpu"
    actual = observe(model, reference.ids_BT)
    return findings + compare(reference.expected, actual, reference.dtype, exact)


def unique_weights(state: dict[str, Tensor]) -> int:
    """Count the numbers in a state dict; tensors that share their memory count once."""
    return sum({(t.data_ptr(), t.shape): t.numel() for t in state.values()}.values())


def _stored_weights(directory: Path) -> int:
    total = 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
            total += sum(map(math.prod, shapes))
    return total


def main() -> None:
    """Check the directory that the command line names, and write the findings as JSON lines to a file.

    The caller judges them. They do not go to the output, where libraries print too.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--findings", type=Path, required=True)
    args = parser.parse_args()
    findings = verify(args.directory, Reference.load(args.reference))
    args.findings.write_text("".join(json.dumps(asdict(finding)) + "\n" for finding in findings))


if __name__ == "__main__":
    main()
