"""Laws of soft prompts: they calibrate as the rows whose embeddings they are; the repair that they train."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from src.data.batches import Supervised, real_tokens
from src.data.distinct import Distinct
from src.data.soft import SoftPrompts
from src.errors import ConfigError
from src.mask import Mask
from src.models.cut import cut
from src.models.fingerprint import weights_fingerprint
from src.models.gated import freeze
from src.models.head import OutputHead
from src.models.layers import decoder_layers
from src.models.loading import load_model, load_tokenizer
from src.prompts.cuts import DrawnCuts
from src.prompts.rows import embedded, row_sets
from src.prompts.tiny import TinyRepair, lesson
from src.prompts.unroll import descend, unroll
from src.prompts.windows import Inner
from src.repair.mask_tuning import MaskTuning
from tests.tiny import KV_SHARED, mask_of, tiny_ids, tiny_model

MASK_MT = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])


def prompts_of(directory: str, corpus: str, size: int = 6, length: int = 256) -> SoftPrompts:
    """Prompts that are the embeddings of the first rows of a file."""
    head = OutputHead(freeze(load_model(directory)))
    ((ids_MT, mask_MT),) = row_sets(load_tokenizer(directory), corpus, 1, size, length)
    embeds_MTH = embedded(head, ids_MT, mask_MT)
    with torch.no_grad():
        likeliest_MT = head.logits(head.hidden({"input_ids": ids_MT, "attention_mask": mask_MT})).argmax(-1)
    return SoftPrompts.labelled(embeds_MTH, mask_MT, likeliest_MT, weights_fingerprint(directory))


def tiny(family: str = "llama", dtype: torch.dtype = torch.float32) -> tuple[OutputHead, TinyRepair, Tensor]:
    """A parent, the repair of a cut of it, and two embedded rows, one of them padded."""
    parent = freeze(tiny_model(family, num_hidden_layers=5)).to(dtype)
    head = OutputHead(parent)
    return head, TinyRepair(parent, mask_of((0, 2, 4), 5)), embedded(head, tiny_ids(2, 9), MASK_MT)


# ---------------------------------------------------------------------- the file


def test_a_label_is_what_is_predicted_at_the_position_before(tmp_path: Path) -> None:
    made = SoftPrompts.labelled(torch.rand(2, 3, 4), torch.tensor([[1, 1, 1], [1, 1, 0]]),
                                torch.tensor([[5, 6, 7], [8, 9, 3]]), "w1-a")  # fmt: skip
    assert made.labels_MT.tolist() == [[-100, 5, 6], [-100, 8, -100]]
    made.save(tmp_path / "a.prompts.safetensors")
    found = SoftPrompts.load(tmp_path / "a.prompts.safetensors", "data.prompts")
    for name in ("embeds_MTH", "mask_MT", "labels_MT"):
        assert torch.equal(getattr(found, name), getattr(made, name))
    assert found.weights == "w1-a"
    with pytest.raises(ConfigError, match=r"patch\.data: .* w1-a, .* has w1-b"):
        found.check("w1-b", "patch.data")
    (tmp_path / "b.prompts.safetensors").write_text("rows")
    with pytest.raises(ConfigError, match=r"data\.prompts: .* no soft prompts"):
        SoftPrompts.load(tmp_path / "b.prompts.safetensors", "data.prompts")


def test_ranks_share_the_prompts_and_lose_none() -> None:
    made = SoftPrompts(torch.rand(5, 3, 4), torch.ones(5, 3).long(), torch.ones(5, 3).long())
    parts = [made.share(rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat([part.embeds_MTH for part in parts]), made.embeds_MTH[[0, 2, 4, 1, 3]])
    assert [len(batch["labels"]) for batch in made.batches(2)] == [2, 2, 1]
    with pytest.raises(ConfigError, match="5 soft prompts for 6 ranks"):
        made.share(0, 6)


def test_a_repair_fitted_to_prompts_is_that_of_the_rows_that_they_embed(
    tmp_path: Path, teacher_dir: str, corpus_file: str, mask_file: str
) -> None:
    path, mask = tmp_path / "six.prompts.safetensors", Mask.load(mask_file)
    prompts_of(teacher_dir, corpus_file).save(path)
    parent, tokenizer, students = load_model(teacher_dir), load_tokenizer(teacher_dir), []
    for data in (corpus_file, str(path)):
        students.append(cut(parent, mask))
        repair = MaskTuning(data, rows=6, device="cpu")
        assert repair(students[-1], parent, mask, tokenizer)
        assert ("soft prompts" in str(repair)) is (data != corpus_file)
    for (name, one), other in zip(students[0].named_parameters(), students[1].parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5, msg=name)


def test_sets_are_consecutive_rows_and_too_few_are_refused(teacher_dir: str, corpus_file: str) -> None:
    tokenizer = load_tokenizer(teacher_dir)
    one, two = row_sets(tokenizer, corpus_file, 2, 3, 10)
    ((both, _),) = row_sets(tokenizer, corpus_file, 1, 6, 10)
    assert torch.equal(torch.cat([one[0], two[0]]), both)
    with pytest.raises(ConfigError, match=r"gives 40 rows .* 7 times model\.prompts 6"):
        row_sets(tokenizer, corpus_file, 7, 6, 10)


# ---------------------------------------------------------------------- the tiny repair


def test_factors_of_zero_leave_the_cut_and_others_scale_the_stream_behind_the_gaps() -> None:
    head, repair, _ = tiny()
    fed, layers = {"input_ids": tiny_ids(2, 9)}, decoder_layers(repair.head.model)[1]
    plain = repair.head.hidden(fed)
    with repair.applied(repair.start):
        assert torch.equal(repair.head.hidden(fed), plain)
    theta_JH = 0.3 * torch.randn(2, 32)
    with repair.applied(theta_JH):
        scaled = repair.head.hidden(fed)
    hooks = [layers[at].register_forward_pre_hook(lambda _m, args, each=each: (args[0] * (1 + each),))
             for at, each in zip((1, 2), theta_JH, strict=True)]  # fmt: skip
    assert torch.equal(repair.head.hidden(fed), scaled)
    assert not torch.allclose(scaled, plain)
    for hook in hooks:
        hook.remove()
    with pytest.raises(ConfigError, match="no gap"):
        TinyRepair(head.model, mask_of((0, 1, 2), 5))


def test_a_layer_that_does_nothing_leaves_nothing_to_learn() -> None:
    parent = freeze(tiny_model("llama", num_hidden_layers=5))
    idle = decoder_layers(parent)[1][3]
    for weight in (idle.self_attn.o_proj.weight, idle.mlp.down_proj.weight):
        weight.zero_()
    repair, head = TinyRepair(parent, mask_of((0, 1, 2, 4), 5)), OutputHead(parent)
    data = lesson(head, embedded(head, tiny_ids(2, 9), MASK_MT), MASK_MT)
    path, norms_T = descend(repair.imitate, repair.start, data, 1.0, 2)
    assert float(repair.imitate(path[-1], data)) < 1e-6
    assert norms_T.max() < 1e-4


def test_padding_of_a_prompt_teaches_nothing() -> None:
    head, repair, embeds_MTH = tiny()
    other = embeds_MTH.clone()
    other[1, 6:] += 5.0
    ends = [repair.learn(lesson(head, each, MASK_MT), Inner(2, 1.0, 1, 0)) for each in (embeds_MTH, other)]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)


def test_the_gradient_through_the_steps_is_that_of_finite_differences() -> None:
    """Through parent, cut and three steps, along a random direction; this family's norms are float64 too."""
    head, repair, embeds_MTH = tiny("gpt2", torch.float64)
    aim = torch.randn(2, 32, generator=torch.Generator().manual_seed(1)).double()

    def outer(prompts: Tensor) -> Tensor:
        data = lesson(head, prompts, MASK_MT)
        return (unroll(repair.imitate, repair.start.double(), data, 0.5, 3) * aim).sum()

    along = torch.randn(embeds_MTH.shape, generator=torch.Generator().manual_seed(2)).double()
    leaf = embeds_MTH.clone().requires_grad_()
    (grad,) = torch.autograd.grad(outer(leaf), leaf)
    ends = [float(outer(embeds_MTH + sign * 1e-5 * along).detach()) for sign in (1, -1)]
    assert float((grad * along).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


def test_the_inner_loss_is_the_divergence_at_positions_with_a_next_one() -> None:
    head, repair, embeds_MTH = tiny()
    fed = {"inputs_embeds": embeds_MTH, "attention_mask": MASK_MT}
    p, q = (each.logits(each.hidden(fed)).log_softmax(-1) for each in (head, repair.head))
    kl_MT = (p.exp() * (p - q)).sum(-1)
    expected = torch.cat([kl_MT[0, :8], kl_MT[1, :5]]).mean()
    torch.testing.assert_close(repair.imitate(repair.start, lesson(head, embeds_MTH, MASK_MT)), expected)


# ---------------------------------------------------------------------- drawn cuts


def test_drawn_masks_keep_both_ends_and_every_other_one_is_drawn() -> None:
    config = tiny_model("llama", num_hidden_layers=5).config
    cuts = DrawnCuts("m", config, 2, seed=3)
    drawn = Counter(cuts.drawn(number).removed for number in range(300))
    assert set(drawn) == {(1, 2), (1, 3), (2, 3)}
    assert min(drawn.values()) > 60
    assert cuts.drawn(7) == DrawnCuts("m", config, 2, seed=3).drawn(7)
    with pytest.raises(ConfigError, match=r"model\.remove: 4 given; .* at most 3 can go"):
        DrawnCuts("m", config, 4, seed=0)


# ---------------------------------------------------------------------- what reads prompts


def test_a_model_whose_layers_read_the_tokens_themselves_is_refused() -> None:
    head = OutputHead(freeze(tiny_model("gemma3n_text", **KV_SHARED)))
    with pytest.raises(ConfigError, match="reads tokens otherwise than their embeddings"):
        embedded(head, tiny_ids(2, 9), MASK_MT)


def test_prompts_are_no_documents_and_all_their_positions_are_read() -> None:
    made = SoftPrompts(torch.rand(2, 9, 4), MASK_MT, torch.where(MASK_MT.bool(), 5, -100))
    (batch,), read = made.batches(8, torch.bfloat16), Distinct()
    read.add(batch)
    assert (read.documents, real_tokens(batch)) == (0, 15)
    assert batch["inputs_embeds"].dtype is torch.bfloat16
    assert len(Supervised.of(batch)) == 8 + 5
