"""Laws of weights that move in a search: what the teacher sees, what is learned, where a recovery starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from src.cli import main, run
from src.data.batches import Supervised
from src.export.verb import main as export
from src.mask import Mask
from src.models.cut import cut
from src.models.loading import load_model, load_tokenizer
from src.policies import GumbelTopK, RandomSearch
from src.recover import Recovery
from src.search import MaskSearch
from src.training.adapters import Adapters, LoRA, Scales, beside, merged
from tests.planning import SEARCH
from tests.tiny import problem_rows

pytest.importorskip("peft")
Batch = dict[str, Tensor]
KINDS = [LoRA, Scales]


@pytest.fixture(scope="module")
def rows() -> Batch:
    return problem_rows(4)


class Still:
    """Enough of a trainer for a step."""

    accumulate_grad_batches, global_step, world_size = 1, 5, 1


def search(teacher_dir: str, adapters: Adapters | None, **keys: Any) -> MaskSearch:
    made = MaskSearch(
        teacher_dir,
        keys.pop("policy", GumbelTopK(init="zeros")),
        remove=2,
        draws=3,
        adapters=adapters,
        **keys,
    )
    made.configure_model()
    made._trainer = Still()  # type: ignore[assignment]
    made.log = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    return made


def stirred(made: MaskSearch) -> MaskSearch:
    """The search after its adapters have learned something."""
    assert made.adapters is not None
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in made.adapters.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_the_teachers_pass_is_the_parents_whatever_the_adapters_learned(
    kind: type[Adapters], teacher_dir: str, rows: Batch
) -> None:
    plain, moving = search(teacher_dir, None), search(teacher_dir, kind())
    theirs, gates = plain.teacher_hidden(rows), torch.tensor([1.0, 0, 1, 1, 0, 1])
    assert torch.equal(moving.hidden(rows, gates), plain.hidden(rows, gates)), "at the start nothing moved"
    stirred(moving)
    assert torch.equal(moving.teacher_hidden(rows), theirs)
    assert not torch.equal(moving.hidden(rows, None), theirs), "the open student is another pass"
    with moving.parents_weights():
        assert torch.equal(moving.hidden(rows, gates), plain.hidden(rows, gates))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_mean_loss(kind: type[Adapters], teacher_dir: str, rows: Batch) -> None:
    """Draw by draw, for logits and adapters alike; a closed layer's adapters get none."""
    made = stirred(search(teacher_dir, kind()))
    assert made.adapters is not None
    given = [made.policy.logits, *made.adapters.parameters()]
    grads = torch.autograd.grad(made.training_step(rows, 0), given)
    signal = made.teacher_signal(Supervised.of(rows))
    losses = [made.divergence(Supervised.of(rows), signal, made.policy.sample(5, d)) for d in range(3)]
    direct = torch.autograd.grad(torch.stack(losses).mean(), given, allow_unused=True)
    for one, other in zip(grads, direct, strict=True):
        torch.testing.assert_close(
            one, torch.zeros_like(one) if other is None else other, rtol=1e-4, atol=1e-8
        )
    assert all(grad.abs().max() > 0 for grad in grads[:1])
    assert made.training_step(rows, 0).isfinite()


def test_the_frozen_weights_stay_and_only_logits_and_adapters_are_in_the_module(
    teacher_dir: str, rows: Batch
) -> None:
    made = search(teacher_dir, LoRA(rank=2))
    (network,) = made._frozen
    before = {name: p.clone() for name, p in network.named_parameters() if not p.requires_grad}
    made.training_step(rows, 0).backward()
    assert {key.split(".")[0] for key in made.state_dict()} == {"policy", "adapters"}
    assert sum(p.requires_grad for p in network.parameters()) == len(list(made.adapters.parameters()))  # type: ignore[union-attr]
    own = dict(network.named_parameters())
    assert all(torch.equal(p, own[name]) and own[name].grad is None for name, p in before.items())


def test_they_train_under_a_policy_that_wants_no_gradient(teacher_dir: str, rows: Batch) -> None:
    made = search(teacher_dir, LoRA(), policy=RandomSearch(masks=3))
    made.training_step(rows, 0).backward()
    assert made.adapters is not None
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in made.adapters.parameters())


def test_they_have_an_optimiser_group_of_their_own(teacher_dir: str) -> None:
    made = search(teacher_dir, LoRA(lr=0.007), optimizer=lambda given: torch.optim.AdamW(given, lr=0.5))
    logits, adapters = made.configure_optimizers().param_groups
    assert (logits["lr"], adapters["lr"]) == (0.5, 0.007)
    assert len(logits["params"]) == 1
    assert {id(p) for p in adapters["params"]} == {id(p) for p in made.adapters.parameters()}  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", KINDS)
def test_merged_into_the_cut_model_they_are_the_gated_student(
    kind: type[Adapters], teacher_dir: str, rows: Batch, tmp_path: Path
) -> None:
    """What is saved, renumbered for the cut and merged computes what the search saw, to rounding."""
    made = stirred(search(teacher_dir, kind()))
    mask = made.mask((0, 2, 3, 5), {"kl": 0.5})
    assert made.adapters is not None
    made.adapters.save(tmp_path / "adapters.safetensors", mask)
    student = merged(cut(load_model(teacher_dir), mask), mask, tmp_path / "adapters.safetensors").eval()
    gated = made.hidden(rows, torch.tensor([1.0, 0, 1, 1, 0, 1]))
    inputs = {key: rows[key] for key in ("input_ids", "attention_mask")}
    found = student.model(**inputs).last_hidden_state
    real = rows["attention_mask"].bool()
    torch.testing.assert_close(found[real], gated[real], rtol=1e-4, atol=1e-4)
    assert type(student) is type(load_model(teacher_dir))
    assert not any("lora" in key or "ia3" in key for key in student.state_dict())


# ---------------------------------------------------------------- through the commands


def arguments(out: Path, teacher: str, corpus: str, **keys: Any) -> list[str]:
    keys = {
        "model.init_args.model": teacher, "data.init_args.train": corpus, "data.init_args.validation": corpus,
        "data.init_args.batch_size": 4, "trainer.limit_val_batches": 0, "trainer.accelerator": "cpu",
        "trainer.logger.init_args.save_dir": out, "trainer.logger.init_args.version": "run",
        "trainer.max_steps": 3, **keys,
    }  # fmt: skip
    return [f"--{key}={value}" for key, value in keys.items()]


TINY = ["fit", "--config", SEARCH, "--config", "configs/policy/tinyfusion.yaml"]
MORE = {
    "model.init_args.calibration_batches": 2,
    "model.init_args.remove": 2,
    "model.init_args.ratio": "null",
}


def test_from_a_search_to_a_proven_export(tmp_path: Path, teacher_dir: str, corpus_file: str) -> None:
    """The mask says both divergences; a recovery starts from the adapters; the result is proven."""
    lr = {"model.init_args.adapters.init_args.lr": 0.005, "trainer.max_steps": 20}
    run([*TINY, *arguments(tmp_path, teacher_dir, corpus_file, **MORE, **lr)])
    path = tmp_path / "search" / "run" / "mask.json"
    mask = Mask.load(path)
    assert mask.metrics["kl_adapted"] < mask.metrics["kl"], "the adapters learned to make up for the cut"
    with safe_open(beside(path), framework="pt") as file:
        layers = {int(name.split(".")[2]) for name in file.keys()}  # noqa: SIM118
    assert layers == {0, 1, 2, 3}, "those of the kept layers, numbered as in the cut model"
    recover = ["fit", "--config", "configs/recover/entropy_kd.yaml", f"--model.init_args.mask={path}"]
    given = arguments(tmp_path, teacher_dir, corpus_file)
    validated = {}
    for init in ("null", "adapters"):
        more = [f"--model.init_args.patch={init}", "--trainer.limit_val_batches=2"]
        done = run(["validate", *recover[1:], *given, *more])
        validated[init] = float(done.trainer.callback_metrics["val/kl"])
    assert validated["adapters"] < validated["null"]
    run([*recover, *given, "--model.init_args.patch=adapters"])
    checkpoint = tmp_path / "recover" / "run" / "checkpoints" / "last.ckpt"
    export(["--mask", str(path), "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("quantize", ["int8", pytest.param("nf4", marks=pytest.mark.slow)])
def test_lora_learns_on_quantised_weights_and_goes_into_a_recovery(
    quantize: str, tmp_path: Path, teacher_dir: str, corpus_file: str
) -> None:
    """The one copy of the weights stays quantised; the recovery merges the adapters into float weights."""
    if quantize == "nf4":  # whose rows are whole blocks of 64
        config = AutoConfig.from_pretrained(teacher_dir)
        config.update({"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 8})
        tokenizer, teacher_dir = load_tokenizer(teacher_dir), str(tmp_path / "wide")
        AutoModelForCausalLM.from_config(config).save_pretrained(teacher_dir)
        tokenizer.save_pretrained(teacher_dir)
    more = {"model.init_args.adapters.init_args.lr": 0.005, "trainer.max_steps": 4}
    given = arguments(tmp_path, teacher_dir, corpus_file, **MORE, **more)
    done = run([*TINY, *given, f"--model.init_args.quantize={quantize}"])
    assert any(p.dtype in (torch.int8, torch.uint8) for p in done.model._frozen[0].parameters())
    path = tmp_path / "search" / "run" / "mask.json"
    with safe_open(beside(path), framework="pt") as file:
        learned = [file.get_tensor(name) for name in file.keys() if ".lora_B." in name]  # noqa: SIM118
    assert learned
    assert all(weight.any() for weight in learned), "they start at zero"
    recover = ["fit", "--config", "configs/recover/entropy_kd.yaml", f"--model.init_args.mask={path}"]
    run([*recover, *arguments(tmp_path, teacher_dir, corpus_file), "--model.init_args.patch=adapters"])
    checkpoint = tmp_path / "recover" / "run" / "checkpoints" / "last.ckpt"
    export(["--mask", str(path), "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "config.json").exists()


def test_without_adapters_nothing_is_left_beside_the_mask(
    tmp_path: Path, teacher_dir: str, corpus_file: str
) -> None:
    run(["fit", "--config", SEARCH, *arguments(tmp_path, teacher_dir, corpus_file, **MORE)])
    path = tmp_path / "search" / "run" / "mask.json"
    assert "kl_adapted" not in Mask.load(path).metrics
    assert not beside(path).exists()


def test_a_recovery_refuses_adapters_of_another_mask_or_none(
    tmp_path: Path, teacher_dir: str, corpus_file: str, mask_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recover = ["fit", "--config", "configs/recover/entropy_kd.yaml", f"--model.init_args.mask={mask_file}"]
    given = [*recover, *arguments(tmp_path, teacher_dir, corpus_file), "--model.init_args.patch=adapters"]
    made = search(teacher_dir, LoRA())
    mask = Mask.load(mask_file)
    assert made.adapters is not None
    for other, told in ((None, "cannot be read"), (replace(mask, seed=7), "another mask")):
        if other is not None:
            made.adapters.save(beside(mask_file), other)
        with pytest.raises(SystemExit) as ended:
            main(given)
        text = capsys.readouterr().err
        assert (ended.value.code, text.count("error:")) == (2, 1)
        assert told in text
    made.adapters.save(beside(mask_file), mask)
    loaded = Recovery(mask_file, patch="adapters")
    loaded.configure_model()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--model.init_args.policy=src.policies.Taylor"], "Taylor"),
        (["--model.init_args.adapters=src.training.adapters.Scales", "--model.init_args.quantize=int8"],
         "LoRA"),
        (["--model.init_args.adapters.init_args.lr=0"], "lr: 0"),
        (["--model.init_args.adapters.init_args.rank=0"], "rank: 0"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_loaded(
    more: list[str], told: str, tmp_path: Path, teacher_dir: str, corpus_file: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("src.models.loading.load_model", None)
    with pytest.raises(SystemExit) as ended:
        main([*TINY, *arguments(tmp_path, teacher_dir, corpus_file), *more])
    text = capsys.readouterr().err
    assert (ended.value.code, text.count("error:")) == (2, 1)
    assert told in text
