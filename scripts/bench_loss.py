"""Memory and time of the loss: chunked projection against the whole vocabulary at once.

Both compute the bucket rule on a top-10 signal, with a trained head, on the same inputs; the gradients of the
hidden states and of the head are compared. Each case runs in a process of its own, whose peak resident memory
is reset just before the loss (Linux); on a GPU the allocator's peak is taken, after a warm-up. Writes
``results/loss.json``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.files import write_json
from src.losses.distill import Distillation
from src.losses.signals import TopK
from src.mask import git_sha
from src.models.summing import summing

VOCABULARIES = (1_000, 32_000, 151_936)


class Head:
    """A bare trained projection, with what a loss asks of an output head."""

    def __init__(self, hidden: int, vocabulary: int, device: str) -> None:
        self.projection = nn.Linear(hidden, vocabulary, bias=False).to(device)
        self.vocabulary = vocabulary
        self.parameters = tuple(self.projection.parameters())
        self.sums = True

    def logits(self, hidden: Tensor, into: tuple[Tensor, ...] = ()) -> Tensor:
        return summing(self.projection, hidden, into) if into else self.projection(hidden)


def whole(head: Head, hidden_NH: Tensor, signal: TopK) -> Tensor:
    """The bucket rule as one would write it: all logits, all log-probabilities, autograd."""
    log_q = head.logits(hidden_NH).log_softmax(-1)
    inside = log_q.gather(-1, signal.ids)
    outside = log_q.scatter(-1, signal.ids, -torch.inf).logsumexp(-1)
    kd = (signal.log_probs.exp() * (signal.log_probs - inside)).sum(-1)
    return (kd + signal.log_rest.exp() * (signal.log_rest - outside)).mean()


def case(
    form: str, vocabulary: int, tokens: int, hidden: int, chunk: int, device: str = "cpu"
) -> dict[str, Any]:
    """Run one case: peak extra memory (bytes), seconds (of the processor, or of the GPU), loss, gradients."""
    torch.manual_seed(0)
    head = Head(hidden, vocabulary, device)
    states = (4 * torch.randn(tokens, hidden)).to(device).requires_grad_()
    classes = (3 * torch.randn(tokens, 11)).log_softmax(-1)
    ids = torch.randint(vocabulary // 10, (tokens, 10)) + torch.arange(10) * (vocabulary // 10)
    top, rest, ids = (x.to(device) for x in (classes[:, :10], classes[:, 10], ids))
    signal, labels = TopK(ids, top, rest, rest), ids[:, 0]
    loss = Distillation(weight="none", chunk_tokens=chunk)

    def work() -> Tensor:
        value = whole(head, states, signal) if form == "whole" else loss(head, states, labels, signal)["loss"]  # type: ignore[arg-type]
        value.backward()
        return value.detach()

    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before, began = memory("VmRSS"), time.process_time()
        value = float(work())
        cost = {"peak_bytes": memory("VmHWM") - before, "cpu_seconds": time.process_time() - began}
    else:
        work()
        states.grad = head.projection.weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, began = torch.cuda.memory_allocated(), time.perf_counter()
        value = float(work())
        torch.cuda.synchronize()
        cost = {"peak_bytes": torch.cuda.max_memory_allocated() - before}
        cost["gpu_seconds"] = time.perf_counter() - began
    return {**cost, "loss": value, "grads": [states.grad, head.projection.weight.grad]}


def memory(field: str) -> int:
    """A figure of this process in bytes: ``VmRSS``, or its peak ``VmHWM``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=VOCABULARIES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("results/loss.json"))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        form, vocabulary, file = args.case.split(",")
        torch.save(case(form, int(vocabulary), args.tokens, args.hidden, args.chunk, args.device), file)
        return
    rows = []
    for vocabulary in args.vocabularies:
        results = {form: _child(form, vocabulary) for form in ("whole", "chunked")}
        a, b = results["whole"].pop("grads"), results["chunked"].pop("grads")
        error = max(float((x - y).norm() / x.norm()) for x, y in zip(a, b, strict=True))
        ratio = results["whole"]["peak_bytes"] / results["chunked"]["peak_bytes"]
        rows.append({"vocabulary": vocabulary, **results, "memory_ratio": ratio, "gradient_error": error})
        print(json.dumps(rows[-1]), flush=True)
    settings = {"tokens": args.tokens, "hidden": args.hidden, "chunk": args.chunk, "dtype": "float32"}
    write_json(
        args.out, {"command": "python -m scripts.bench_loss", "commit": git_sha(), **settings, "rows": rows}
    )


def _child(form: str, vocabulary: int) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        run = [sys.executable, "-m", "scripts.bench_loss", *sys.argv[1:]]
        subprocess.run([*run, "--case", f"{form},{vocabulary},{file.name}"], check=True)
        return torch.load(file.name, map_location="cpu", weights_only=True)


if __name__ == "__main__":
    main()
