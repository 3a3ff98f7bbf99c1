"""Laws of a loss as a sum of terms, and of the hidden-state term: formula, zero, and what changes nothing."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from src.cli import main, run
from src.data.arithmetic import build_tokenizer, problems
from src.data.batches import Supervised, supervised
from src.errors import ConfigError
from src.export.verb import main as export
from src.losses import CrossEntropy, Distillation, HiddenStates, Weighted
from src.mask import Mask
from src.models.cut import cut
from src.models.loading import load_model
from src.models.streams import streams
from src.recover import Recovery
from src.teachers import LiveTeacher
from src.training.scopes import load_student
from tests.planning import LENGTH, RECOVER, H, L, planner_of
from tests.tiny import FAMILIES, LAYERS, tiny_ids, tiny_model

Batch = dict[str, Tensor]
STATES = {"term": {"class_path": "src.losses.HiddenStates"}, "weight": 10.0}
REMOVED = {"term": {"class_path": "src.losses.HiddenStates", "init_args": {"layers": [1]}}}


@pytest.fixture(scope="module")
def rows() -> Batch:
    tokenizer = build_tokenizer()
    tokenizer.padding_side = "right"
    texts = [row["question"] for row in problems("train", 5, 0)]
    batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :3] = -100  # a prompt
    return {**batch, "labels": labels}


def recovery(mask: str, *terms: Weighted, **keys: Any) -> Recovery:
    """A recovery whose models are loaded and whose teacher is ready."""
    made = Recovery(mask, terms=list(terms) or None, **keys)
    made.configure_model()
    made.teacher.setup(made)
    return made


def graded(made: Recovery, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Value and gradient of the loss on a batch."""
    made.zero_grad()
    value = made.losses(Supervised.of(batch))["loss"]
    value.backward()
    return value.detach(), {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}


def close(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=1e-7)
    assert one[1].keys() == other[1].keys()
    for name, grad in one[1].items():
        torch.testing.assert_close(grad, other[1][name], rtol=1e-4, atol=1e-6)


def alone() -> Weighted:
    return Weighted(HiddenStates())


# ---------------------------------------------------------------- the hidden-state term


def test_it_is_its_formula(mask_file: str, rows: Batch) -> None:
    """Layer by layer, from the states that transformers itself returns."""
    made, keep = recovery(mask_file, alone()), [0, 2, 3, 5]
    index = supervised(rows["labels"])
    inputs = {key: rows[key] for key in ("input_ids", "attention_mask")}
    (parent,) = made.teacher._model  # type: ignore[attr-defined]
    expected = torch.zeros(())
    for position, (_, reader) in enumerate(itertools.pairwise(keep)):
        own = made.model(**inputs, output_hidden_states=True).hidden_states[position + 1]
        target = parent(**inputs, output_hidden_states=True).hidden_states[reader]  # what enters the reader
        own_NH, target_NH = own.flatten(0, 1)[index], target.flatten(0, 1)[index]
        expected += ((own_NH - target_NH).pow(2).mean(-1) / target_NH.pow(2).mean(-1)).mean()
    last = {}
    for model in (made.model, parent):
        norm = model.model.norm
        hook = norm.register_forward_pre_hook(lambda _, given: last.setdefault("x", given[0]))
        model(**inputs)
        hook.remove()
        last[id(model)] = last.pop("x").flatten(0, 1)[index]
    own_NH, target_NH = last[id(made.model)], last[id(parent)]
    expected += ((own_NH - target_NH).pow(2).mean(-1) / target_NH.pow(2).mean(-1)).mean()
    torch.testing.assert_close(made.losses(Supervised.of(rows))["loss"], expected, rtol=1e-5, atol=1e-6)
    assert expected > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_zero_where_student_and_parent_are_one(family: str) -> None:
    """Nothing removed: every stream equals its target to the last bit, in every family."""
    parent, ids = tiny_model(family), tiny_ids()
    mask = Mask("m", LAYERS, tuple(range(LAYERS)), "x")
    student = cut(parent, mask)
    pairs = HiddenStates().pairs(mask)
    assert pairs == tuple((i, i) for i in range(LAYERS))
    with streams(parent, range(LAYERS)) as theirs, streams(student, range(LAYERS)) as own:
        parent(ids)
        student(ids)
    assert theirs.keys() == own.keys() == set(range(LAYERS))
    assert all(torch.equal(own[a], theirs[b]) for a, b in pairs)
    assert len({float(h.detach().sum()) for h in own.values()}) == LAYERS, "each is a stream of its own"


@pytest.mark.parametrize(
    ("layers", "pairs"),
    [
        ("all", ((0, 1), (1, 2), (2, 4), (3, 5))),  # keep 0 2 3 5 of 6: before 1, 2, 4 and the norm
        ("gaps", ((0, 1), (2, 4))),
        ([2, -1], ((1, 2), (3, 5))),
    ],
)
def test_targets_lie_behind_the_gaps(layers: Any, pairs: Any, mask_file: str) -> None:
    assert HiddenStates(layers).pairs(Mask.load(mask_file)) == pairs


def test_a_removed_tail_is_a_gap() -> None:
    assert HiddenStates("gaps").pairs(Mask("m", 6, (0, 1, 2), "x")) == ((2, 5),)


def test_padding_and_packing_change_nothing(mask_file: str, rows: Batch) -> None:
    made = recovery(mask_file, alone(), Weighted(Distillation(weight="none"), 0.5))
    whole = graded(made, rows)
    filled = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    padded = {k: torch.nn.functional.pad(v, (0, 7), value=filled[k]) for k, v in rows.items()}
    close(whole, graded(made, padded))
    lengths = rows["attention_mask"].sum(1).tolist()
    packed = {
        key: torch.cat([row[:n] for row, n in zip(rows[key], lengths, strict=True)])[None]
        for key in ("input_ids", "labels")
    }
    starts = [0, *itertools.accumulate(lengths)][:-1]
    packed["labels"][0, starts] = -100
    packed["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    close(whole, graded(made, packed))


def test_micro_batches_change_nothing(mask_file: str, rows: Batch) -> None:
    """Weighed by their positions, as :class:`src.training.ranks.MicroBatches` does."""
    made = recovery(mask_file, alone(), distillation=Distillation(weight="none"))
    value, grads = graded(made, rows)
    counts = [len(supervised(rows["labels"][at])) for at in (slice(0, 2), slice(2, 5))]
    parts = [graded(made, {k: v[at] for k, v in rows.items()}) for at in (slice(0, 2), slice(2, 5))]
    shares = [n / sum(counts) for n in counts]
    total = sum(share * part[0] for share, part in zip(shares, parts, strict=True))
    summed = {
        name: sum(share * part[1][name] for share, part in zip(shares, parts, strict=True)) for name in grads
    }
    close((value, grads), (total, summed))


def test_recomputed_activations_change_nothing(mask_file: str, rows: Batch) -> None:
    plain, again = (recovery(mask_file, alone(), checkpoint_activations=on) for on in (False, True))
    one, other = graded(plain, rows), graded(again, rows)
    assert torch.equal(one[0], other[0])
    close(one, other)


def test_no_supervised_position_gives_zero_not_nan(mask_file: str, rows: Batch) -> None:
    made = recovery(mask_file, alone())
    value, grads = graded(made, {**rows, "labels": torch.full_like(rows["labels"], -100)})
    assert value == 0
    assert all((grad == 0).all() for grad in grads.values())


# ---------------------------------------------------------------- the sum


def test_the_sum_is_the_weighted_sum_in_value_and_gradient(mask_file: str, rows: Batch) -> None:
    terms = [Weighted(Distillation(), 0.5), Weighted(CrossEntropy(chunk_tokens=7), 2.0), alone()]
    value, grads = graded(recovery(mask_file, *terms), rows)
    parts = [graded(recovery(mask_file, Weighted(each.term)), rows) for each in terms]
    weights = [each.weight for each in terms]
    total = sum(w * part[0] for w, part in zip(weights, parts, strict=True))
    summed = {
        name: sum(w * part[1].get(name, 0.0) for w, part in zip(weights, parts, strict=True))
        for name in grads
    }
    close((value, grads), (total, summed))


def test_cross_entropy_is_the_models_own_loss(mask_file: str, rows: Batch) -> None:
    made = recovery(mask_file, Weighted(CrossEntropy(chunk_tokens=5)))
    value, grads = graded(made, rows)
    made.zero_grad()
    theirs = made.model(**rows).loss
    theirs.backward()
    close((value, grads), (theirs.detach(), {n: p.grad for n, p in made.named_parameters()}))


def test_distillation_alone_is_the_loss_of_before(mask_file: str, rows: Batch) -> None:
    """The shorthand, the default and the only term are one: to the last bit."""
    ways = [
        recovery(mask_file, distillation=Distillation()),
        recovery(mask_file),
        recovery(mask_file, Weighted(Distillation())),
    ]
    (value, grads), *others = [graded(made, rows) for made in ways]
    for other in others:
        assert torch.equal(value, other[0])
        assert all(torch.equal(grad, other[1][name]) for name, grad in grads.items())


def test_validation_and_cache_ask_the_one_distillation(mask_file: str) -> None:
    own = Distillation(k=3, rule="renormalise")
    assert Recovery(mask_file, terms=[alone(), Weighted(own, 0.1)]).distillation is own
    assert Recovery(mask_file, terms=[alone()], distillation=own).distillation is own
    assert Recovery(mask_file, terms=[alone()]).distillation.k == 10


# ---------------------------------------------------------------- through the commands


def fit(out: Path, teacher: str, corpus: str, mask: str, *more: str) -> Any:
    keys = {
        "model.init_args.model": teacher, "model.init_args.mask": mask, "data.init_args.train": corpus,
        "data.init_args.validation": corpus, "data.init_args.batch_size": 4, "trainer.max_steps": 3,
        "trainer.limit_val_batches": 0, "trainer.accelerator": "cpu", "trainer.log_every_n_steps": 1,
        "trainer.logger.init_args.save_dir": out, "trainer.logger.init_args.version": "run",
    }  # fmt: skip
    given = ["fit", "--config", "configs/recover/entropy_kd.yaml", *(f"--{k}={v}" for k, v in keys.items())]
    return run([*given, *more])


@pytest.mark.parametrize("scope", ["full", "cut_adjacent", "lora"])
def test_in_every_scope_it_trains_is_logged_and_exports(
    scope: str, tmp_path: Path, teacher_dir: str, corpus_file: str, mask_file: str
) -> None:
    """By its overlay, beside the config's distillation; proven after the export."""
    done = fit(
        tmp_path, teacher_dir, corpus_file, mask_file, f"--model.init_args.scope={scope}",
        "--config", "configs/recover/hidden_states.yaml",
    )  # fmt: skip
    figures = done.trainer.callback_metrics
    assert {"train/loss", "train/kd", "train/states"} <= figures.keys()
    assert figures["train/states"] > 0
    moved = {n for n, p in done.model.named_parameters() if p.requires_grad and p.grad is not None}
    assert moved == {n for n, p in done.model.named_parameters() if p.requires_grad}
    checkpoint = str(tmp_path / "recover" / "run" / "checkpoints" / "last.ckpt")
    ids = torch.arange(3, 23)[None]
    back = load_student(load_model(teacher_dir), Mask.load(mask_file), checkpoint)
    torch.testing.assert_close(back(ids).logits, done.model.model.eval()(ids).logits, rtol=1e-4, atol=1e-5)
    export(["--mask", mask_file, "--checkpoint", checkpoint, "--out", str(tmp_path / "out")])
    assert torch.equal(load_model(str(tmp_path / "out"))(ids).logits, back(ids).logits)


def test_the_loss_falls_on_the_streams_too(
    tmp_path: Path, teacher_dir: str, corpus_file: str, mask_file: str, rows: Batch
) -> None:
    terms = f"--model.init_args.terms=[{STATES}]"
    done = fit(
        tmp_path, teacher_dir, corpus_file, mask_file, terms, "--model.init_args.distillation=null",
        "--trainer.max_steps=30", "--model.init_args.optimizer.init_args.lr=0.01",
    )  # fmt: skip
    before = recovery(mask_file, alone()).losses(Supervised.of(rows))["states"]
    assert done.model.losses(Supervised.of(rows))["states"] < before / 2


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ([f"--model.init_args.terms=[{STATES}, {STATES}]"], "HiddenStates is given twice"),
        ([f"--model.init_args.terms=[{STATES | {'weight': 0}}]"], "weight: 0"),
        (
            [f"--model.init_args.terms=[{STATES}]", "--model.init_args.teacher.init_args.model=other"],
            "teacher.model",
        ),
        (
            [f"--model.init_args.terms=[{STATES}]", "--model.init_args.teacher=src.teachers.CachedTeacher"],
            "CachedTeacher",
        ),
        ([f"--model.init_args.terms=[{REMOVED}]"], "layers that the mask keeps"),
        (["--model.init_args.terms=[{term: src.losses.HidenStates}]"], "HidenStates"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_loaded(
    more: list[str], told: str, tmp_path: Path, teacher_dir: str, corpus_file: str, mask_file: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("src.models.loading.load_model", None)
    keys = {
        "model.init_args.model": teacher_dir, "model.init_args.mask": mask_file,
        "data.init_args.train": corpus_file, "trainer.accelerator": "cpu",
        "trainer.logger.init_args.save_dir": tmp_path,
    }  # fmt: skip
    given = ["fit", "--config", "configs/recover/entropy_kd.yaml", *(f"--{k}={v}" for k, v in keys.items())]
    with pytest.raises(SystemExit) as ended:
        main([*given, *more])
    text = capsys.readouterr().err
    assert (ended.value.code, text.count("error:")) == (2, 1)
    assert told in text


def test_a_cache_names_what_to_use(mask_file: str) -> None:
    from src.teachers import CachedTeacher

    with pytest.raises(ConfigError, match=r"src\.teachers\.LiveTeacher"):
        CachedTeacher().states([1])
    CachedTeacher().states([])
    LiveTeacher().states([1])


# ---------------------------------------------------------------- plans


def test_a_plan_counts_the_streams_of_student_and_parent(tmp_path: Path) -> None:
    """The term holds positions x H floats for each kept layer of both, and makes no pass of its own."""
    few = {"data.init_args.batch_size": 1, "model.init_args.distillation.init_args.k": 4}
    plain = planner_of(tmp_path, RECOVER, **few)
    terms = {"model.init_args.terms": f"[{STATES}]"}
    with_states = planner_of(tmp_path, RECOVER, **few, **terms)
    assert with_states.trace().teacher_flops == plain.trace().teacher_flops
    assert with_states.trace().flops == plain.trace().flops
    more = with_states.trace().peak["activations"] - plain.trace().peak["activations"]
    assert more == 2 * (L - 1) * 4 * (LENGTH - 1) * H


def test_a_plan_asks_the_k_of_the_terms(tmp_path: Path) -> None:
    terms = "[{term: {class_path: src.losses.Distillation, init_args: {k: 3}}}]"
    keys = {"model.init_args.distillation": "null", "model.init_args.terms": terms}
    own, default = planner_of(tmp_path, RECOVER, **keys), planner_of(tmp_path, RECOVER)
    assert own.cache.raw < default.cache.raw


def test_a_plan_refuses_what_the_run_would(tmp_path: Path) -> None:
    keys = {"model.init_args.terms": f"[{STATES}]", "model.init_args.teacher": "src.teachers.CachedTeacher"}
    with pytest.raises(ConfigError, match=r"src\.teachers\.LiveTeacher"):
        planner_of(tmp_path, RECOVER, **keys).trace()
