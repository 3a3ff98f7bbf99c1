"""What a search step costs, against the naive step, one saving at a time: ``make search-step``.

The naive step runs, for each draw, a separate teacher and a student whose every layer and weight is under
autograd, and takes the KL over the whole vocabulary at all positions. Each rung of the ladder adds one
saving; all rungs but the last have the same gate gradient, and the script checks it. The last one (top-10
signal) is another, cheaper loss and stands apart. Masks are drawn uniformly; those of a search that has
learned begin more alike, and share more.

The variants take turns within a repeat, and ratios are taken within repeats. On a CPU the seconds are the
process's own, which others on the machine do not stretch. Writes ``results/search_step.json``.
"""

from __future__ import annotations

import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scripts.lab.benches import against, in_turns, qwen
from scripts.lab.results import options, write
from src.data.batches import Supervised
from src.losses.distill import Distillation
from src.models.gated import GatedLayers, freeze
from src.models.head import OutputHead
from src.policies import GumbelTopK
from src.policies.draws import apart, together
from src.search import MaskSearch

Step = Callable[[], Tensor]
OURS = "+ layers that passes have in common, once"


def ladder(args: Namespace) -> dict[str, Step]:
    """Each variant as a function that returns the gradient of the gates, summed over the draws."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(args.vocabulary, (args.rows, args.tokens), generator=generator).to(args.device)
    labels = ids.clone()
    labels[:, : int(args.tokens * args.prompt)] = -100
    rows = Supervised.of({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    masks = []
    for _ in range(args.draws):
        mask = torch.ones(args.layers)
        mask[torch.randperm(args.layers, generator=generator)[: args.remove]] = 0.0
        masks.append(mask.to(args.device))
    shape = (args.vocabulary, args.hidden, args.layers, 4, args.dtype, args.device)

    def whole(head: OutputHead) -> Tensor:
        said = head.model(input_ids=ids, attention_mask=rows.batch["attention_mask"], use_cache=False)
        return said.logits.log_softmax(-1)

    teacher = OutputHead(freeze(qwen(*shape)))
    taught = torch.no_grad()(lambda: whole(teacher))

    def naive(trained: bool = False, lean: bool = False, teach_once: bool = True) -> Step:
        network = qwen(*shape).requires_grad_(trained)
        gates, head = GatedLayers(network, lean=lean), OutputHead(network)

        def step() -> Tensor:
            leaves = [mask.clone().requires_grad_() for mask in masks]
            once = taught() if teach_once else None
            for leaf in leaves:
                said = taught() if once is None else once
                with gates.use(leaf):
                    kl = F.kl_div(whole(head), said, log_target=True, reduction="none").sum(-1)
                kl.flatten()[rows.index_N].mean().backward()
            network.zero_grad()
            return torch.stack([leaf.grad for leaf in leaves if leaf.grad is not None]).sum(0)

        return step

    def ours(measure: Callable[..., Any], k: int | None = None) -> Step:
        loss, policy = Distillation(k=k, weight="none"), GumbelTopK(init="zeros")
        with tempfile.TemporaryDirectory() as folder:
            qwen(*shape).save_pretrained(folder)
            search = MaskSearch(folder, policy, remove=args.remove, distillation=loss, dtype=args.dtype)
            search.configure_model()
        search.head.model.to(args.device)
        search._trainer = Namespace(world_size=1)  # type: ignore[assignment]  # all that it is asked
        search.head.hidden(search.head.few)  # by which the layers are known to return the stream alone
        return lambda: torch.stack([draw.grad_U for draw in measure(search, rows, masks)]).sum(0)

    return {
        "naive": naive(trained=True, teach_once=False),
        "+ frozen weights": naive(teach_once=False),
        "+ one teacher pass for all draws": naive(),
        "+ closed layers without autograd, no product with a gate of 0 or 1": naive(lean=True),
        "+ supervised positions, chunked KL, shared teacher": ours(apart),
        OURS: ours(together),
        "top-10 signal (another loss)": ours(together, 10),
    }


def main() -> None:
    args = options(
        __doc__, vocabulary=(32_000, "classes"), layers=(16, "of the model"),
        hidden=(256, "size of the hidden states"), tokens=(256, "of a row"), rows=(2, "of a batch"),
        draws=(4, "masks of a step"), remove=(4, "layers removed"), repeats=(9, "of each timing"),
        prompt=(0.5, "share of a row that is prompt, not supervised"), device=("cpu", "where it runs"),
        dtype=("float32", "of the weights; the gates are float32"),
        out=(Path("results/search_step.json"), "results"),
    )  # fmt: skip
    steps = ladder(args)
    found = dict[str, Tensor]()
    kept = {n: lambda n=n, step=step: found.update({n: step().cpu()}) for n, step in steps.items()}
    times = in_turns(kept, args.repeats, time.process_time if args.device == "cpu" else time.perf_counter)
    rows, reference = {}, found["naive"]
    for name, seconds in times.items():
        median, spread = against(times["naive"], seconds)
        far = float((found[name] - reference).abs().max() / reference.abs().max())
        print(f"{median:5.2f} x  {name}  (gradient differs by {far:.1e})")
        rows[name] = {"gradient_error": far, "seconds": seconds, "speedup": median, "speedup_range": spread}
    told = {"threads": torch.get_num_threads(), "settings": {**vars(args), "out": str(args.out)}}
    write(args.out, {**told, "variants": rows})


if __name__ == "__main__":
    main()
