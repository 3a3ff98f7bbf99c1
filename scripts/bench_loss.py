"""Memory and time of the loss: chunks of tokens against the whole vocabulary at once.

Both compute the bucket rule on a top-10 signal, with a trained head, on the same inputs; the gradients of the
hidden states and of the head are compared. Each case runs in a process of its own, whose peak resident memory
is reset just before the loss (Linux). Writes ``results/loss.json``.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from numpy.linalg import norm
from torch import Tensor, nn

from scripts.lab.benches import forget_peak, memory
from scripts.lab.jobs import isolated
from scripts.lab.results import JSON, options, write
from src.losses.distill import Distillation
from src.losses.signals import TopK
from src.models.head import OutputHead


class Head(OutputHead):
    """A bare trained linear map."""

    scale, cap = 1.0, None

    def __init__(self, hidden: int, vocabulary: int) -> None:
        self.linear, self.vocabulary = nn.Linear(hidden, vocabulary, bias=False), vocabulary
        self._weights = ["weight"]


def whole(head: Head, hidden_NH: Tensor, signal: TopK) -> Tensor:
    """The bucket rule as one would write it: all logits, all log-probabilities, autograd."""
    log_q = head.logits(hidden_NH).log_softmax(-1)
    inside = log_q.gather(-1, signal.ids)
    outside = log_q.scatter(-1, signal.ids, -torch.inf).logsumexp(-1)
    kd = (signal.log_probs.exp() * (signal.log_probs - inside)).sum(-1)
    return (kd + signal.log_rest.exp() * (signal.log_rest - outside)).mean()


def case(form: str, vocabulary: int, tokens: int, hidden: int, chunk: int) -> JSON:
    """Run one case: peak extra memory (bytes), CPU seconds, loss, gradients as NumPy arrays."""
    torch.manual_seed(0)
    head = Head(hidden, vocabulary)
    states = (4 * torch.randn(tokens, hidden)).requires_grad_()
    classes = (3 * torch.randn(tokens, 11)).log_softmax(-1)
    ids = torch.randint(vocabulary // 10, (tokens, 10)) + torch.arange(10) * (vocabulary // 10)
    signal, labels = TopK(ids, classes[:, :10], classes[:, 10], classes[:, 10]), ids[:, 0]
    loss = Distillation(weight="none", chunk_tokens=chunk)
    forget_peak()
    before, began = memory("VmRSS"), time.process_time()
    value = whole(head, states, signal) if form == "whole" else loss(head, states, labels, signal)["loss"]
    value.backward()
    grads = [x.grad.numpy() for x in (states, *head.parameters) if x.grad is not None]
    return {
        "peak_bytes": memory("VmHWM") - before, "cpu_seconds": time.process_time() - began,
        "loss": value.item(), "grads": grads,
    }  # fmt: skip


def main() -> None:
    args = options(
        __doc__, tokens=(4096, "positions"), hidden=(1024, "size of the hidden states"),
        chunk=(256, "positions projected at once"), vocabularies=([1_000, 32_000, 151_936], "classes"),
        out=(Path("results/loss.json"), "results"),
    )  # fmt: skip
    rows, sizes = [], (args.tokens, args.hidden, args.chunk)
    for vocabulary in args.vocabularies:
        found = {form: isolated(case, form, vocabulary, *sizes) for form in ("whole", "chunked")}
        a, b = found["whole"].pop("grads"), found["chunked"].pop("grads")
        error = max(float(norm(x - y) / norm(x)) for x, y in zip(a, b, strict=True))
        ratio = found["whole"]["peak_bytes"] / found["chunked"]["peak_bytes"]
        rows.append({"vocabulary": vocabulary, **found, "memory_ratio": ratio, "gradient_error": error})
        print(json.dumps(rows[-1]), flush=True)
    settings = {"tokens": args.tokens, "hidden": args.hidden, "chunk": args.chunk, "dtype": "float32"}
    write(args.out, {**settings, "rows": rows})


if __name__ == "__main__":
    main()
