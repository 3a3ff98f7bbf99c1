"""Laws of LinearPatch: what the repair is, when a stock model can hold it, and what it must not touch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from src.errors import ConfigError
from src.models.cut import cut
from src.models.layers import decoder_layers
from src.models.loading import load_model, load_tokenizer
from src.models.streams import inputs
from src.repair import stream as streams
from src.repair.fold import Regression, fold
from src.repair.hadamard import hadamard
from src.repair.linear_patch import LinearPatch
from src.repair.stream import Junction, StreamRepair, junctions, matrices, repaired, scales
from src.repair.writers import Linear, stream_writer
from tests.tiny import VOCAB, mask_of, tiny_ids, tiny_model

MASK, PLACE = mask_of((0, 1, 4, 5, 6)), Junction(before=1, start=2, end=4)


def batch_of(rows: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Rows of different lengths, so that padding must be left out."""
    ids_BT = tiny_ids(rows, seed=seed)
    lengths_B = torch.arange(rows) % 3 + 11
    seen = (torch.arange(ids_BT.shape[1]) < lengths_B[:, None]).long()
    return {"input_ids": ids_BT, "attention_mask": seen, "labels": torch.where(seen.bool(), ids_BT, -100)}


def stream(model: PreTrainedModel, layer: int, batch: dict[str, Tensor]) -> Tensor:
    """Real tokens of what enters a layer, ``[N, H]`` float64."""
    with inputs(model, dict.fromkeys([layer], "")) as seen:
        real_N = streams.run(model, batch)
        return seen[layer].flatten(0, 1)[real_N].double()


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(tiny_ids(3, seed=9)).logits


# ---------------------------------------------------------------------- the repair of the stream


def test_hadamard_is_orthonormal_with_entries_of_one_size() -> None:
    for size in [*range(1, 200), 576, 896, 1152]:
        h = hadamard(size)
        if h is not None:
            assert torch.allclose(h @ h.T, torch.eye(size, dtype=h.dtype), atol=1e-12)
            assert torch.allclose(h.abs(), torch.full_like(h, size**-0.5))
    have = {size for size in range(1, 128) if hadamard(size) is not None}
    assert have == {1, 2, *range(4, 128, 4)} - {52, 92, 100, 116}
    in_use = [576, 896, 960, 1152, 1536, 1600, 2304, 2560, 2880, 3072, 3584]  # no powers of two
    assert all(hadamard(size) is not None for size in in_use)


@pytest.mark.parametrize(
    ("keep", "places"),
    [
        ((0, 1, 4, 5, 6), [(1, 2, 4)]),
        ((0, 2, 3, 6), [(0, 1, 2), (2, 4, 6)]),  # one for each maximal run
        ((0, 1, 2, 3), []),  # at the end: nothing receives it
        ((3, 4, 5, 6), []),  # at the start: nothing comes before it
        ((2, 4), [(0, 3, 4)]),
    ],
)
def test_a_junction_for_each_run_between_kept_layers(keep: tuple[int, ...], places: list[Any]) -> None:
    assert junctions(mask_of(keep)) == [Junction(*place) for place in places]


def test_the_repair_is_symmetric_and_its_eigenvalues_are_the_scales() -> None:
    parent, batch = tiny_model("llama"), batch_of()
    basis = hadamard(32)
    (p_HH,) = matrices(parent, [PLACE], [batch], "rotate")
    (d_H,) = scales(parent, [PLACE], [batch], basis)
    assert d_H.min() > 0
    assert not torch.allclose(d_H, torch.ones_like(d_H), atol=0.05)  # else this says nothing
    assert torch.equal(p_HH, p_HH.T) or torch.allclose(p_HH, p_HH.T, atol=1e-14)
    torch.testing.assert_close(torch.linalg.eigvalsh(p_HH), d_H.sort().values)


@pytest.mark.parametrize("mode", ["rotate", "diag"])
def test_repaired_magnitudes_are_the_targets(mode: Any) -> None:
    """On the calibration batch, seen at the place where the repair acts."""
    parent, batch = tiny_model("llama"), batch_of()
    student = cut(parent, MASK)
    repairs = [StreamRepair(p) for p in matrices(parent, [PLACE], [batch], mode)]
    basis = hadamard(32) if mode == "rotate" else torch.eye(32, dtype=torch.float64)
    with repaired(student, [PLACE], repairs):
        found_H = (stream(student, PLACE.before + 1, batch) @ basis).abs().mean(0)
    target_H = (stream(parent, PLACE.end, batch) @ basis).abs().mean(0)
    torch.testing.assert_close(found_H, target_H, rtol=1e-5, atol=0)
    bare_H = (stream(student, PLACE.before + 1, batch) @ basis).abs().mean(0)
    assert ((bare_H - target_H).abs() / target_H).max() > 0.05


def test_scales_do_not_depend_on_the_split_into_batches_or_on_padding() -> None:
    parent, batch = tiny_model("llama"), batch_of(6)
    whole = scales(parent, [PLACE], [batch], hadamard(32))
    rows = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(6)]
    torch.testing.assert_close(scales(parent, [PLACE], rows, hadamard(32)), whole, rtol=1e-5, atol=0)
    batch["input_ids"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], VOCAB - 1)
    torch.testing.assert_close(scales(parent, [PLACE], [batch], hadamard(32)), whole, rtol=1e-5, atol=0)


def test_scales_of_one_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "scales", lambda *_: torch.ones(1, 32, dtype=torch.float64))
    parent = tiny_model("llama")
    student = cut(parent, MASK)
    (p_HH,) = matrices(parent, [PLACE], [batch_of()], "rotate")
    assert torch.equal(p_HH, torch.eye(32, dtype=torch.float64))
    before = logits(student)
    with repaired(student, [PLACE], [StreamRepair(p_HH)]):
        assert torch.equal(logits(student), before)
    with repaired(student, [PLACE], [StreamRepair(2 * p_HH)]):
        assert not torch.equal(logits(student), before)


def test_without_a_hadamard_matrix_the_channels_are_scaled_and_a_warning_says_so() -> None:
    parent = tiny_model("llama", hidden_size=52)
    with pytest.warns(UserWarning, match="no Hadamard matrix of hidden size 52"):
        (rotated,) = matrices(parent, [PLACE], [batch_of()], "rotate")
    (plain,) = matrices(parent, [PLACE], [batch_of()], "diag")
    assert torch.equal(rotated, plain)
    assert torch.equal(plain, plain.diagonal().diag())


def test_repair_only_distillation_moves_the_repair_and_nothing_else(
    teacher_dir: str, corpus_file: str
) -> None:
    parent, mask = load_model(teacher_dir), mask_of((0, 1, 4, 5), 6, teacher_dir)
    student, tokenizer = cut(parent, mask), load_tokenizer(teacher_dir)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    plain = LinearPatch(corpus_file, goal="rotate", device="cpu")
    trained = LinearPatch(corpus_file, goal="rotate", distill_steps=10, lr=1e-2, device="cpu")
    rows, places = plain.calibration(tokenizer), junctions(mask)
    first, last = (x.stream_repairs(student, parent, places, rows) for x in (plain, trained))
    assert not torch.allclose(first[0].matrix, last[0].matrix, atol=1e-3)
    assert not torch.allclose(last[0].matrix, last[0].matrix.T, atol=1e-3)  # free, no longer H diag(d) H^T
    for name, tensor in student.state_dict().items():  # the same keys, the same values
        assert torch.equal(tensor, before.pop(name))
    assert not before

    def divergence(repairs: list[StreamRepair]) -> float:
        with repaired(student, places, repairs), torch.no_grad():
            said, own = (m(rows[0]["input_ids"]).logits.log_softmax(-1) for m in (parent, student))
        return float((said.exp() * (said - own)).sum(-1)[rows[0]["attention_mask"].bool()].mean())

    assert divergence(last) < divergence(first)


# ---------------------------------------------------------------------- the fold


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "granite", "gpt_neox"])
def test_the_fold_is_exact_where_the_correction_is_in_the_span(family: str) -> None:
    """Another output map is asked for (bias, transposed storage and residual scale included), and found."""
    student = cut(tiny_model(family), MASK)
    other = copy.deepcopy(student)
    batches = [batch_of(24, seed) for seed in (1, 2)]
    writer = stream_writer(other, PLACE.before, batches[0])
    assert isinstance(writer, Linear)
    with torch.no_grad():
        for parameter in writer.module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    path, _ = decoder_layers(other)
    with inputs(other, dict.fromkeys([PLACE.before + 1], "")) as seen:

        def target(batch: dict[str, Tensor], _: Tensor) -> Tensor:
            streams.run(other, batch)
            return seen[PLACE.before + 1]

        assert not torch.allclose(logits(student), logits(other), atol=1e-2)
        repair = fold(student, PLACE.before, batches, target, ridge=0.0)
    assert repair.module == f"{path}.{PLACE.before}.{writer.name}"
    assert repair.after < 1e-8 < 1e-4 < repair.before
    torch.testing.assert_close(logits(student), logits(other), rtol=1e-3, atol=1e-3)


def test_the_fold_does_not_depend_on_the_split_into_batches_or_on_padding() -> None:
    parent, batch = tiny_model("llama"), batch_of(24)
    (p_HH,) = matrices(parent, [PLACE], [batch], "rotate")
    rows = [{key: value[i : i + 6] for key, value in batch.items()} for i in range(0, 24, 6)]
    seen = batch["attention_mask"].bool()
    other = {**batch, "input_ids": torch.where(seen, batch["input_ids"], VOCAB - 1)}
    found = []
    for batches in ([batch], rows, [other]):
        student, repair_ = cut(parent, MASK), StreamRepair(p_HH)
        fold(student, PLACE.before, batches, lambda _, h_BTH: repair_(h_BTH), ridge=0.1)  # noqa: B023
        found.append(logits(student))
    for split in found[1:]:
        torch.testing.assert_close(split, found[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[0], logits(cut(parent, MASK)), atol=1e-2)


def test_the_fold_of_a_repair_is_not_exact_in_general() -> None:
    """A stream h and its double: the MLP reads the same, so it cannot write ``h P - h`` and its double.

    By hand: with the weights w of both tokens and r their corrections, the best common one leaves
    ``w1 w2 / (w1 + w2) |r1 - r2|^2``, and ``r2 - r1 = h P - h``.
    """
    student = tiny_model("llama", rms_norm_eps=0.0)
    layer: Any = decoder_layers(student)[1][0]
    table = student.get_input_embeddings().weight.data
    layer.self_attn.o_proj.weight.data.zero_()
    table[4] = 2 * table[3]
    batch = {"input_ids": torch.tensor([[3], [4]]), "attention_mask": torch.ones(2, 1, dtype=torch.long)}
    (p_HH,) = matrices(student, [Junction(0, 1, 3)], [batch_of()], "rotate")
    h_H, repair_ = table[3].double(), StreamRepair(p_HH)
    out_2H = stream(student, 1, batch)
    torch.testing.assert_close(out_2H[1] - out_2H[0], h_H, rtol=1e-4, atol=1e-6)  # the layer adds the same
    w1, w2 = 1 / (out_2H @ p_HH).square().sum(-1)
    by_hand = float(w1 * w2 / (w1 + w2) * (h_H @ p_HH - h_H).square().sum() / 2)
    repair = fold(student, 0, [batch], lambda _, h_BTH: repair_(h_BTH), ridge=0.0)
    assert repair.after == pytest.approx(by_hand, rel=1e-4)
    assert by_hand > 1e-4


def test_the_regression_is_that_of_the_stacked_system() -> None:
    """Against lstsq on rows scaled by the root of their weight, with the ridge as further rows."""
    draw = torch.Generator().manual_seed(0)
    a, r = (torch.randn(40, n, generator=draw, dtype=torch.float64) for n in (6, 3))
    w, ridge = torch.rand(40, generator=draw, dtype=torch.float64), 0.3
    fitted = Regression()
    for part in (slice(0, 15), slice(15, 40)):
        fitted.add(a[part], r[part], w[part])
    scaled = a * w.sqrt()[:, None]
    power = scaled.square().sum(0)
    system = torch.cat([scaled, torch.diag((ridge * power).sqrt())])
    wanted = torch.cat([r * w.sqrt()[:, None], torch.zeros(6, 3, dtype=torch.float64)])
    expected = torch.linalg.lstsq(system, wanted).solution
    torch.testing.assert_close(fitted.solve(ridge), expected)
    left = (w[:, None] * (a @ expected - r).square()).sum() / 40
    assert fitted.error(expected) == pytest.approx(float(left))


@pytest.mark.parametrize(("family", "layer"), [("gemma2", 1), ("olmo2", 1)])
def test_a_layer_without_a_map_to_the_stream_is_refused(family: str, layer: int) -> None:
    """A norm after the MLP."""
    with pytest.raises(ConfigError, match=f"folded into layer {layer} of this '{family}'"):
        stream_writer(tiny_model(family), layer, batch_of())


def test_a_map_shared_with_another_layer_is_not_changed() -> None:
    model = tiny_model("llama")
    layers: Any = decoder_layers(model)[1]
    layers[2].mlp.down_proj = layers[1].mlp.down_proj
    with pytest.raises(ConfigError, match="folded into layer 1"):
        stream_writer(model, 1, batch_of())
