"""Find the halves of decoder layers, attention and feed-forward, without knowing a family.

A layer that adds to the residual stream twice, one addition after the other, consists of two halves:

    h' = h + attention(h),    h'' = h' + feed_forward(h')

The *writer* of a half is the module whose output is added. With both writers at zero the layer is the
identity, to the last bit; :func:`find_halves` looks for this. A gate multiplies the output of a writer, so a
closed half adds nothing, and the stream is that of a model without it. Whatever mixes tokens (convolution,
state space) is called attention here.

Shapes: B batch, T tokens, H hidden, L layers, U = 2 L halves in order of computation.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from src.models.layers import Arguments, decoder_layers, first
from src.models.streams import silenced
from src.models.structure import Misfit, alike

TRIED = 8
"""Tokens of the pass that finds the writers."""


@dataclass(frozen=True)
class Halves:
    """Which modules of one layer belong to its attention, and which to its feed-forward.

    Attributes:
        writers: paths, inside the layer, of the two modules whose output is added to the stream.
        half: 0 (attention) or 1 (feed-forward) for the path of each module inside the layer.
        idle: paths of the outermost modules that need not run where their half adds nothing.
    """

    writers: tuple[str, str]
    half: dict[str, int]
    idle: tuple[str, ...]

    def of(self, name: str) -> int | None:
        """Return 0 for a part of the attention, 1 for one of the feed-forward, None for one of neither.

        Args:
            name: dotted path, inside the layer, of a module or of an attribute of one.
        """
        return self.half.get(name, self.half.get(name.rpartition(".")[0]))


@torch.no_grad()
def find_halves(model: PreTrainedModel) -> list[Halves]:
    """Return the halves of every layer of a model, found by silencing modules in one layer of each kind.

    Raises:
        Misfit: a layer does not consist of two halves, one after the other; the message gives the reason.
    """
    _, layers = decoder_layers(model)
    calls = layer_calls(model)
    halves: dict[int, Halves] = {}
    for kind in alike(layers):  # one trial serves all layers that differ in their weights alone
        index = min(kind)
        try:
            halves |= dict.fromkeys(kind, _Trial(layers[index], *calls[index]).halves())
        except Misfit as e:
            raise Misfit(
                f"unit: layer {index} of this '{model.config.model_type}' ({type(layers[index]).__name__}) "
                f"{e}, so its halves cannot go alone. Use whole layers (unit: layer)."
            ) from e
    return [halves[index] for index in range(len(layers))]


def layer_calls(model: PreTrainedModel) -> list[Arguments]:
    """Return the arguments with which each decoder layer is called in a pass over a few tokens."""
    _, layers = decoder_layers(model)
    calls: list[Arguments] = [((), {})] * len(layers)
    with ExitStack() as stack:
        for index, layer in enumerate(layers):

            def record(_: nn.Module, args: Any, kwargs: Any, index: int = index) -> None:
                calls[index] = args, kwargs

            stack.callback(layer.register_forward_pre_hook(record, with_kwargs=True).remove)
        model(input_ids=torch.arange(3, 3 + TRIED, device=model.device)[None], use_cache=False)
    return calls


class _Trial:
    """Runs a layer with parts of it silenced, on the arguments of one call."""

    def __init__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.layer, self.kwargs = layer, dict(kwargs)
        hidden = args[0] if args else self.kwargs.pop("hidden_states")
        noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
        self.h, self.rest = hidden + noise.to(hidden), args[1:]
        try:
            self.spans = self._spans()
        except Exception as e:  # whatever a family's own code raises
            raise Misfit(f"does not run on a stream alone ({e})") from e

    def run(self, *silent: str, observed: str | None = None) -> tuple[Tensor, Tensor | None]:
        """Run the layer with some modules silenced (their output zero).

        Returns:
            The stream ``[B, T, H]`` behind the layer, and the output of the module ``observed``, if one is
            given and it ran.
        """
        outputs: list[Tensor] = []
        with ExitStack() as stack:
            if observed is not None:
                module = self.layer.get_submodule(observed)
                # A copy, since some families add the attention to it in place.
                hook = module.register_forward_hook(lambda _m, _i, out: outputs.append(first(out).clone()))
                stack.callback(hook.remove)
            for path in silent:
                stack.enter_context(silenced(self.layer.get_submodule(path)))
            out = first(self.layer(self.h, *self.rest, **self.kwargs))
        return out, outputs[-1] if outputs else None

    def identity(self, *silent: str) -> bool:
        """Return whether the layer passes its input on unchanged when these modules are silenced."""
        return torch.equal(self.run(*silent)[0], self.h)

    def halves(self) -> Halves:
        """Find the writers: the last two modules that, silenced together, make the layer the identity.

        One ends before the other begins, and neither does so alone. The writers bound the two halves, to
        which all other modules are assigned by when they run.

        Raises:
            Misfit: there are no such writers, or the layer runs its halves side by side, or has weights
                outside of both; the message is the predicate of a sentence on the layer.
        """
        order = sorted(self.spans, key=lambda path: self.spans[path][1], reverse=True)
        for at, second in enumerate(order):
            if self.identity(second):
                raise Misfit("adds to the residual stream once")
            for early in order[at + 1 :]:
                apart = self.spans[early][1] < self.spans[second][0] and not self.identity(early)
                if apart and self.identity(early, second):
                    return self._sorted(early, second)
        raise Misfit("does not add an attention and a feed-forward to the residual stream")

    def _sorted(self, attention: str, feed_forward: str) -> Halves:
        _, usual = self.run(observed=feed_forward)
        _, alone = self.run(attention, observed=feed_forward)
        if usual is not None and alone is not None and torch.equal(usual, alone):
            raise Misfit("runs attention and feed-forward side by side, on the same stream")
        border, half = self.spans[attention][1], dict[str, int]()
        for path, module in self.layer.named_modules():
            begin, end = self.spans.get(path, (border, border))
            if end <= border and path in self.spans:
                half[path] = 0
            elif begin >= border and path in self.spans:
                half[path] = 1
            elif (above := path.rpartition(".")[0]) in half:  # a module that did not run, such as an expert
                half[path] = half[above]
            elif own := [name for name, _ in module.named_parameters(recurse=False)]:
                raise Misfit(f"has weights outside of both ({'.'.join(filter(None, [path, own[0]]))})")
        self._check_writers(feed_forward, half)
        return Halves((attention, feed_forward), half, self._idle(attention, feed_forward))

    def _check_writers(self, feed_forward: str, half: dict[str, int]) -> None:
        """Refuse a layer that adds something behind its attention to the stream, past the feed-forward."""
        without, _ = self.run(feed_forward)
        # A module around the writer may hold the addition itself.
        behind = [p for p in half if half[p] == 1 and not feed_forward.startswith(f"{p}.")]
        for path in (path for path in behind if path.rpartition(".")[0] not in behind):
            if not torch.equal(self.run(feed_forward, path)[0], without):
                raise Misfit(f"adds '{path}' to the residual stream beside an attention and a feed-forward")

    def _idle(self, *writers: str) -> tuple[str, ...]:
        """Return the outermost modules whose output reaches the stream by their half's writer alone."""
        idle: list[str] = []
        for path in self.spans:  # in the order of named_modules: the outer before the inner
            if not any(path.startswith(f"{outer}.") for outer in idle) and self.identity(path, *writers):
                idle.append(path)
        return tuple(idle)

    def _spans(self) -> dict[str, tuple[int, int]]:
        """Return when each module, by path, begins and ends in one pass, counted in calls and returns."""
        begun, spans, clock = dict[str, int](), dict[str, tuple[int, int]](), [0]

        def tick() -> int:
            clock[0] += 1
            return clock[0]

        with ExitStack() as stack:
            for path, module in self.layer.named_modules():
                if path:
                    before = module.register_forward_pre_hook(
                        lambda _m, _i, path=path: begun.setdefault(path, tick()) and None
                    )
                    after = module.register_forward_hook(
                        lambda _m, _i, _o, path=path: spans.update({path: (begun[path], tick())})
                    )
                    stack.callback(before.remove)
                    stack.callback(after.remove)
            self.layer(self.h, *self.rest, **self.kwargs)
        return {path: spans[path] for path, _ in self.layer.named_modules() if path in spans}
