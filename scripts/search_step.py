"""What a search step costs, against the naive step, one saving at a time: ``make search-step``.

The naive step runs, for each draw, a separate teacher and a student whose every layer and weight is under
autograd, and takes the KL over the whole vocabulary at all positions. Each rung of the ladder adds one
saving; all rungs but the last have the same gate gradient, and the script checks it. The last one (top-10
signal) is another, cheaper loss and stands apart.

The variants take turns within a repeat, and ratios are taken within repeats. Writes
``results/search_step.json``.
"""

from __future__ import annotations

import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scripts.lab.benches import in_turns, qwen
from scripts.lab.results import options, write
from src.data.batches import supervised
from src.losses.distill import Distillation
from src.losses.signals import live_signal
from src.models.gated import GatedLayers, freeze
from src.models.head import OutputHead

Step = Callable[[], Tensor]


def ladder(args: Namespace) -> dict[str, Step]:
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
    shape = (args.vocabulary, args.hidden, args.layers, 4, args.dtype, args.device)
    teacher = OutputHead(freeze(qwen(*shape)))

    def rung(
        say: Callable[[OutputHead], Any],
        loss: Callable[[OutputHead, Any], Tensor],
        trained: bool = False,
        lean: bool = True,
        teach_once: bool = True,
    ) -> Step:
        network = qwen(*shape).requires_grad_(trained)
        gates, head = GatedLayers(network, skip_closed_autograd=lean), OutputHead(network)

        def step() -> Tensor:
            leaves = [mask.clone().requires_grad_() for mask in masks]
            said = say(head) if teach_once else None
            for leaf in leaves:
                with gates.use(leaf):
                    loss(head, say(head) if said is None else said).backward()
            network.zero_grad()
            return torch.stack([leaf.grad for leaf in leaves if leaf.grad is not None]).sum(0)

        return step

    def whole(head: OutputHead) -> Tensor:
        said = head.model(input_ids=ids, attention_mask=batch["attention_mask"], use_cache=False)
        return said.logits.log_softmax(-1)

    def whole_kl(head: OutputHead, said: Tensor) -> Tensor:
        kl = F.kl_div(whole(head), said, log_target=True, reduction="none").sum(-1)
        return kl.flatten()[index].mean()

    def states(head: OutputHead) -> Tensor:
        return head.hidden(batch).flatten(0, 1)[index]

    def ours(k: int | None) -> Step:
        distillation = Distillation(k=k, weight="none")
        return rung(
            torch.no_grad()(lambda head: live_signal(head, states(head), k)),
            lambda head, said: distillation(head, states(head), targets, said)["loss"],
        )

    naive = partial(rung, torch.no_grad()(lambda _: whole(teacher)), whole_kl)
    return {
        "naive": naive(trained=True, lean=False, teach_once=False),
        "+ frozen weights": naive(lean=False, teach_once=False),
        "+ one teacher pass for all draws": naive(lean=False),
        "+ closed layers without autograd": naive(),
        "+ supervised positions, chunked KL, shared teacher": ours(None),
        "top-10 signal (another loss)": ours(10),
    }


def main() -> None:
    args = options(
        __doc__, vocabulary=(32_000, "classes"), layers=(16, "of the model"),
        hidden=(256, "size of the hidden states"), tokens=(256, "of a row"), rows=(2, "of a batch"),
        draws=(4, "masks of a step"), remove=(4, "layers removed"), repeats=(3, "of each timing"),
        prompt=(0.5, "share of a row that is prompt, not supervised"), device=("cpu", "where it runs"),
        dtype=("float32", "of the weights; the gates are float32"),
        out=(Path("results/search_step.json"), "results"),
    )  # fmt: skip
    steps = ladder(args)
    reference = steps["naive"]()
    size = reference.abs().max()
    far = {name: float((step() - reference).abs().max() / size) for name, step in steps.items()}
    finished = {name: lambda step=step: step().tolist() for name, step in steps.items()}
    times = in_turns(finished, args.repeats, time.perf_counter)
    rows = {}
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(times["naive"], seconds, strict=True)]
        median = statistics.median(ratios)
        rows[name] = {"gradient_error": far[name], "seconds": seconds, "speedup": median}
        rows[name]["speedup_range"] = [min(ratios), max(ratios)]
        print(f"{median:5.2f} x  {name}  (gradient differs by {far[name]:.1e})")
    told = {"threads": torch.get_num_threads(), "settings": {**vars(args), "out": str(args.out)}}
    write(args.out, {**told, "variants": rows})


if __name__ == "__main__":
    main()
