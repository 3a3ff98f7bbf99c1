"""What a search step costs, against the naive step, one saving at a time: ``make search-step``.

The naive step runs, for each draw, a separate teacher and a student whose every layer and weight is under
autograd, and takes the KL over the whole vocabulary at all positions. Each rung of the ladder adds one
saving; all rungs but the last have the same gate gradient, and the script checks it. The last one (top-10
signal) is another, cheaper loss and stands apart.

The variants take turns within a repeat, and ratios are taken within repeats. Writes
``results/search_step.json``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from src.data.batches import supervised
from src.files import write_json
from src.losses.distill import Distillation
from src.losses.signals import live_signal
from src.mask import git_sha
from src.models.gated import GatedLayers, freeze
from src.models.head import OutputHead

Step = Callable[[], Tensor]


def model(args: argparse.Namespace) -> PreTrainedModel:
    """A Qwen3 with weights large enough that its predictions differ from token to token."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3", vocab_size=args.vocabulary, hidden_size=args.hidden, intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers, num_attention_heads=4, num_key_value_heads=2,
        head_dim=args.hidden // 4, tie_word_embeddings=True, initializer_range=0.06,
    )  # fmt: skip
    with torch.device(args.device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype)).eval()


def ladder(args: argparse.Namespace) -> dict[str, Step]:
    """Each variant as a function that returns the gradient of the gates, summed over the draws."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(args.vocabulary, (args.rows, args.tokens), generator=generator).to(args.device)
    labels = ids.clone()
    labels[:, : int(args.tokens * args.prompt)] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    masks = []
    for _ in range(args.draws):
        mask = torch.ones(args.layers)
        mask[torch.randperm(args.layers, generator=generator)[: args.remove]] = 0.0
        masks.append(mask.to(args.device))
    index = supervised(labels)
    targets = labels.flatten()[index + 1]
    teacher = freeze(model(args))

    def student(trained: bool, lean: bool) -> tuple[PreTrainedModel, GatedLayers, OutputHead]:
        network = model(args).requires_grad_(trained)
        return network, GatedLayers(network, skip_closed_autograd=lean), OutputHead(network)

    def whole_kl(network: PreTrainedModel, said: Tensor) -> Tensor:
        logits = network(input_ids=ids, attention_mask=batch["attention_mask"], use_cache=False).logits
        kl = F.kl_div(logits.log_softmax(-1), said, log_target=True, reduction="none").sum(-1)
        return kl.flatten()[index].mean()

    @torch.no_grad()
    def say() -> Tensor:
        return teacher(
            input_ids=ids, attention_mask=batch["attention_mask"], use_cache=False
        ).logits.log_softmax(-1)

    def naive(trained: bool, lean: bool, teach_once: bool) -> Step:
        network, gates, _ = student(trained, lean)

        def step() -> Tensor:
            total, said = torch.zeros_like(masks[0]), say() if teach_once else None
            for mask in masks:
                leaf = mask.clone().requires_grad_()
                with gates.use(leaf):
                    loss = whole_kl(network, say() if said is None else said)
                loss.backward()
                assert leaf.grad is not None
                total += leaf.grad
            network.zero_grad()
            return total

        return step

    def ours(k: int | None) -> Step:
        _, gates, head = student(trained=False, lean=True)
        distillation = Distillation(k=k, weight="none")

        def step() -> Tensor:
            total = torch.zeros_like(masks[0])
            with torch.no_grad():
                signal = live_signal(head, head.hidden(batch).flatten(0, 1)[index], k)
            for mask in masks:
                leaf = mask.clone().requires_grad_()
                with gates.use(leaf):
                    hidden = head.hidden(batch).flatten(0, 1)[index]
                loss = distillation(head, hidden, targets, signal)["loss"]
                total += torch.autograd.grad(loss, leaf)[0]
            return total

        return step

    return {
        "naive": naive(trained=True, lean=False, teach_once=False),
        "+ frozen weights": naive(trained=False, lean=False, teach_once=False),
        "+ one teacher pass for all draws": naive(trained=False, lean=False, teach_once=True),
        "+ closed layers without autograd": naive(trained=False, lean=True, teach_once=True),
        "+ supervised positions, chunked KL, shared teacher": ours(None),
        "top-10 signal (another loss)": ours(10),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in {
        "vocabulary": 32_000, "layers": 16, "hidden": 256, "tokens": 256, "rows": 2, "draws": 4, "remove": 4,
        "repeats": 3,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument(
        "--prompt", type=float, default=0.5, help="share of a row that is prompt, not supervised"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the weights; the gates are float32")
    parser.add_argument("--out", type=Path, default=Path("results/search_step.json"))
    args = parser.parse_args()
    steps = ladder(args)
    reference = steps["naive"]()
    rows: dict[str, dict[str, Any]] = {}
    for name, step in steps.items():
        error = float((step() - reference).abs().max() / reference.abs().max())
        rows[name] = {"gradient_error": error, "seconds": []}
    for _ in range(args.repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step().tolist()  # waits for a GPU
            rows[name]["seconds"].append(time.perf_counter() - start)
    naive = rows["naive"]["seconds"]
    for row in rows.values():
        ratios = [a / b for a, b in zip(naive, row["seconds"], strict=True)]
        row["speedup"], row["speedup_range"] = statistics.median(ratios), [min(ratios), max(ratios)]
    for name, row in rows.items():
        equal = f"gradient differs by {row['gradient_error']:.1e}"
        print(f"{row['speedup']:5.2f} x  {statistics.median(row['seconds']):6.2f} s  {name}  ({equal})")
    record = {
        "command": "python -m scripts.search_step " + " ".join(sys.argv[1:]),
        "commit": git_sha(), "threads": torch.get_num_threads(),
        "settings": {k: v for k, v in vars(args).items() if k != "out"}, "variants": rows,
    }  # fmt: skip
    write_json(args.out, record)


if __name__ == "__main__":
    main()
