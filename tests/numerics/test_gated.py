"""Laws of the gated student, on every family: open = teacher, closed layers change no gradient."""

from __future__ import annotations

import pytest
import torch

from src.models.gated import GatedLayers, freeze
from src.models.layers import decoder_layers
from tests.tiny import FAMILIES, LAYERS, tiny_ids, tiny_model

CLOSED = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0])


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_open_gates_are_the_teacher(family: str) -> None:
    model, ids = freeze(tiny_model(family)), tiny_ids()
    expected = logits(model, ids)
    keys = list(model.state_dict())
    gates = GatedLayers(model)
    assert torch.equal(logits(model, ids), expected)
    with gates.use(torch.ones(LAYERS)):
        assert torch.equal(logits(model, ids), expected)
    with gates.use(CLOSED):
        assert not torch.equal(logits(model, ids), expected)
    assert list(model.state_dict()) == keys
    gates.remove()
    assert torch.equal(logits(model, ids), expected)


def gate_gradient(family: str, **keys: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of a loss with respect to the gates and to the embedded inputs."""
    model = freeze(tiny_model(family))
    gates = GatedLayers(model, **keys)
    values = CLOSED.clone().requires_grad_()
    inputs = model.get_input_embeddings()(tiny_ids()).detach().requires_grad_()
    with gates.use(values):
        loss = model(inputs_embeds=inputs, use_cache=False).logits.logsumexp(-1).mean()
    gradient = torch.autograd.grad(loss, (values, inputs))
    return gradient[0], gradient[1]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "mixtral", "smollm3"])
def test_closed_layers_without_autograd_leave_gradients_bit_equal(family: str) -> None:
    lean, full = gate_gradient(family), gate_gradient(family, lean=False)
    assert torch.equal(lean[0], full[0])
    assert torch.equal(lean[1], full[1])
    assert (lean[0][CLOSED == 0] != 0).all(), "a closed gate must still learn"


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_activation_checkpointing_leaves_gradients_bit_equal(family: str) -> None:
    stored, recomputed = gate_gradient(family), gate_gradient(family, checkpoint_activations=True)
    assert torch.equal(stored[0], recomputed[0])
    assert torch.equal(stored[1], recomputed[1])


def test_a_gate_gradient_is_its_finite_difference() -> None:
    model, ids = freeze(tiny_model("gpt2").double()), tiny_ids()
    gates = GatedLayers(model)

    def loss(values: torch.Tensor) -> torch.Tensor:
        with gates.use(values):
            return logits(model, ids).logsumexp(-1).mean()

    # GPT-2, as it computes in double throughout; away from 0, where the chain through a layer is dropped.
    values = torch.linspace(0.3, 0.9, LAYERS, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(loss, values)


def test_closed_layers_hold_no_graph() -> None:
    """The saved activations shrink with the closed layers: counted through autograd's own hooks."""
    model, ids = freeze(tiny_model("llama")), tiny_ids()

    def saved(skip: bool) -> int:
        gates, total = GatedLayers(model, lean=skip), [0]

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            total[0] += tensor.numel()
            return tensor

        values = CLOSED.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), gates.use(values):
            logits(model, ids)
        gates.remove()
        return total[0]

    assert saved(True) < 0.85 * saved(False)


def test_tuple_outputs_are_gated_too() -> None:
    """Older families return ``(hidden, ...)`` from a layer; only the hidden states are mixed."""
    model, ids = freeze(tiny_model("llama")), tiny_ids()
    with GatedLayers(model).use(CLOSED):
        expected = logits(model, ids)
    tupled = freeze(tiny_model("llama"))
    _, layers = decoder_layers(tupled)
    for layer in layers:
        layer.forward = (lambda plain: lambda *a, **k: (plain(*a, **k), "extra"))(layer.forward)
    gates = GatedLayers(tupled)
    for layer in layers:
        layer.forward = (lambda gated: lambda *a, **k: gated(*a, **k)[0])(layer.forward)
    with gates.use(CLOSED):
        assert torch.equal(logits(tupled, ids), expected)
