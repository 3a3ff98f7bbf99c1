"""Terms of a recovery's loss through the commands: trained, exported, refused, planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from src.cli import main, run
from src.data.batches import Supervised
from src.errors import ConfigError
from src.export.verb import main as export
from src.losses.density import Density
from src.losses.hidden_states import HiddenStates
from src.losses.objective import Weighted
from src.mask import Mask
from src.models.cut import cut
from src.models.loading import load_model
from src.recover import Recovery
from src.teachers import CachedTeacher, LiveTeacher
from src.training.scopes import load_student
from tests.marks import slow
from tests.planning import LENGTH, MLP, RECOVER, ROWS, H, L, V, planner_of
from tests.tiny import problem_rows

STATES = {"term": {"class_path": "src.losses.HiddenStates"}, "weight": 10.0}
DENSITY = {"term": {"class_path": "src.losses.Density"}, "weight": 1.0}
UNCOUNTED = DENSITY["term"] | {"init_args": {"eps": 0}}
REMOVED = {"term": {"class_path": "src.losses.HiddenStates", "init_args": {"layers": [1]}}}


def fit(out: Path, teacher: str, corpus: str, mask: str, *more: str) -> Any:
    keys = {
        "model.init_args.model": teacher, "model.init_args.mask": mask, "data.init_args.train": corpus,
        "data.init_args.validation": corpus, "data.init_args.batch_size": 4, "trainer.max_steps": 3,
        "trainer.limit_val_batches": 0, "trainer.accelerator": "cpu", "trainer.log_every_n_steps": 1,
        "trainer.logger.init_args.save_dir": out, "trainer.logger.init_args.version": "run",
    }  # fmt: skip
    given = ["fit", "--config", "configs/recover/entropy_kd.yaml", *(f"--{k}={v}" for k, v in keys.items())]
    return run([*given, *more])


@pytest.mark.parametrize("scope", ["full", slow("cut_adjacent"), slow("lora")])
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


@pytest.mark.slow
def test_layers_that_learn_one_by_one_export_and_the_others_stay_the_parents(
    tmp_path: Path, teacher_dir: str, corpus_file: str
) -> None:
    """By the overlay: of five layers the two around the gap move, and nothing else does."""
    mask = tmp_path / "mask.json"
    Mask(teacher_dir, 6, (0, 1, 2, 4, 5), "test").save(mask)
    done = fit(
        tmp_path, teacher_dir, corpus_file, str(mask), "--config", "configs/recover/local.yaml",
        "--trainer.max_steps=20", "--trainer.limit_val_batches=1", "--trainer.val_check_interval=10",
    )  # fmt: skip
    figures = done.trainer.callback_metrics
    assert {"train/states", "val/kl"} <= figures.keys()
    assert "train/kd" not in figures
    checkpoint = str(tmp_path / "recover" / "run" / "checkpoints" / "last.ckpt")
    export(["--mask", str(mask), "--checkpoint", checkpoint, "--out", str(tmp_path / "out")])
    loaded, plain = load_model(str(tmp_path / "out")), cut(load_model(teacher_dir), Mask.load(mask))
    ids = torch.arange(3, 23)[None]
    torch.testing.assert_close(loaded(ids).logits, done.model.model.eval()(ids).logits)
    moved = {n for n, p in loaded.named_parameters() if not torch.equal(p, plain.get_parameter(n))}
    assert moved == {n for n, _ in loaded.named_parameters() if ".layers.2." in n or ".layers.3." in n}
    rows, before = (
        Supervised.of(problem_rows(5, prompt=3)),
        Recovery(str(mask), terms=[Weighted(HiddenStates())]),
    )
    before.configure_model()
    before.teacher.setup(before)
    states = [float(before.losses(rows)["states"])]
    before.model.load_state_dict(loaded.state_dict())
    states.append(float(before.losses(rows)["states"]))
    assert states[1] < 0.9 * states[0], "it learns what it is for"


@pytest.mark.parametrize("scope", ["full", slow("lora")])
def test_density_falls_is_logged_and_exports(
    scope: str, tmp_path: Path, teacher_dir: str, corpus_file: str, mask_file: str
) -> None:
    """By its overlay, on held-out rows too; what is exported has no trace of it."""
    rows, untrained = (
        Supervised.of(problem_rows(5, prompt=3)),
        Recovery(mask_file, terms=[Weighted(Density())]),
    )
    untrained.configure_model()
    untrained.teacher.setup(untrained)
    before = untrained.losses(rows)["density"]
    done = fit(
        tmp_path, teacher_dir, corpus_file, mask_file, f"--model.init_args.scope={scope}",
        "--config", "configs/recover/density.yaml", "--trainer.max_steps=24", "--trainer.limit_val_batches=1",
        "--trainer.val_check_interval=8", "--model.init_args.optimizer.init_args.lr=0.01",
    )  # fmt: skip
    figures = done.trainer.callback_metrics
    assert {
        "train/loss",
        "train/kd",
        "train/density",
        "train/active",
        "val/kl",
        "val/density",
    } <= figures.keys()
    assert 0 < figures["val/active"] < 1
    assert done.model.losses(rows)["density"] < before
    checkpoint = str(tmp_path / "recover" / "run" / "checkpoints" / "last.ckpt")
    export(["--mask", mask_file, "--checkpoint", checkpoint, "--out", str(tmp_path / "out")])
    ids = torch.arange(3, 23)[None]
    back = load_student(load_model(teacher_dir), Mask.load(mask_file), checkpoint)
    assert torch.equal(load_model(str(tmp_path / "out"))(ids).logits, back(ids).logits)


@pytest.mark.parametrize(
    ("overlay", "key", "value"), [("reverse_kl", "reverse_below", 0.5), ("tail", "tail", 1.0)]
)
def test_a_recovery_with_another_divergence_is_logged_and_exports(
    overlay: str, key: str, value: float, tmp_path: Path, teacher_dir: str, corpus_file: str, mask_file: str
) -> None:
    done = fit(tmp_path, teacher_dir, corpus_file, mask_file, "--config", f"configs/recover/{overlay}.yaml")
    assert (getattr(done.model.distillation, key), done.model.distillation.weight) == (value, "linear")
    checkpoint = str(tmp_path / "recover" / "run" / "checkpoints" / "last.ckpt")
    export(["--mask", mask_file, "--checkpoint", checkpoint, "--out", str(tmp_path / "out")])
    ids, trained = torch.arange(3, 23)[None], done.model.model.eval()
    torch.testing.assert_close(load_model(str(tmp_path / "out"))(ids).logits, trained(ids).logits)


@pytest.mark.slow
def test_directions_for_a_part_of_the_run_are_trained_on_and_exported(
    tmp_path: Path, teacher_dir: str, corpus_file: str, mask_file: str
) -> None:
    """The last of three steps is without them; the run ends elsewhere than one that has none."""
    term = STATES["term"] | {"init_args": {"error": "direction"}}  # type: ignore[operator]
    terms = f"--model.init_args.terms=[{STATES | {'term': term, 'until': 0.5}}]"
    plain = fit(tmp_path / "plain", teacher_dir, corpus_file, mask_file).model.model.eval()
    done = fit(tmp_path, teacher_dir, corpus_file, mask_file, terms)
    assert done.model.done == pytest.approx(2 / 3)
    checkpoint = str(tmp_path / "recover" / "run" / "checkpoints" / "last.ckpt")
    export(["--mask", mask_file, "--checkpoint", checkpoint, "--out", str(tmp_path / "out")])
    ids, trained = torch.arange(3, 23)[None], done.model.model.eval()
    torch.testing.assert_close(load_model(str(tmp_path / "out"))(ids).logits, trained(ids).logits)
    assert not torch.allclose(plain(ids).logits, trained(ids).logits, rtol=1e-4, atol=1e-5)


def test_the_loss_falls_on_the_streams_too(
    tmp_path: Path, teacher_dir: str, corpus_file: str, mask_file: str
) -> None:
    rows = Supervised.of(problem_rows(5, prompt=3))
    untrained = Recovery(mask_file, terms=[Weighted(HiddenStates())])
    untrained.configure_model()
    untrained.teacher.setup(untrained)
    before = untrained.losses(rows)["states"]
    terms = f"--model.init_args.terms=[{STATES}]"
    done = fit(
        tmp_path, teacher_dir, corpus_file, mask_file, terms, "--model.init_args.distillation=null",
        "--trainer.max_steps=30", "--model.init_args.optimizer.init_args.lr=0.01",
    )  # fmt: skip
    assert done.model.losses(rows)["states"] < before / 2


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ([f"--model.init_args.terms=[{STATES}, {STATES}]"], "HiddenStates is given twice"),
        ([f"--model.init_args.terms=[{STATES | {'weight': -1}}]"], "weight: -1"),
        ([f"--model.init_args.terms=[{DENSITY | {'term': UNCOUNTED}}]"], "eps: 0"),
        (
            [f"--model.init_args.terms=[{STATES}]", "--model.init_args.teacher.init_args.model=other"],
            "teacher.model",
        ),
        (
            [f"--model.init_args.terms=[{STATES}]", "--model.init_args.teacher=src.teachers.CachedTeacher"],
            "CachedTeacher",
        ),
        (
            ["--config=configs/recover/tail.yaml", "--model.init_args.teacher=src.teachers.CachedTeacher"],
            "distillation.tail: it reads the teacher's whole distribution",
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


def test_a_plan_counts_the_activations_that_a_density_reads(tmp_path: Path) -> None:
    """Positions x channels for each layer of the student: the term makes no pass, and recomputes the rest."""
    few = {"data.init_args.batch_size": 1, "model.init_args.distillation.init_args.k": 4}
    plain = planner_of(tmp_path, RECOVER, **few)
    counted = planner_of(tmp_path, RECOVER, **few, **{"model.init_args.terms": f"[{DENSITY}]"})
    assert counted.trace().flops == plain.trace().flops
    more = counted.trace().peak["activations"] - plain.trace().peak["activations"]
    held = (L - 1) * 4 * (LENGTH - 1) * MLP
    assert held <= more < held + 8 * 4 * (LENGTH - 1) * MLP, "and what one layer's count takes for a moment"


def test_a_plan_asks_the_k_of_the_terms(tmp_path: Path) -> None:
    terms = "[{term: {class_path: src.losses.Distillation, init_args: {k: 3}}}]"
    keys = {"model.init_args.distillation": "null", "model.init_args.terms": terms}
    own, default = planner_of(tmp_path, RECOVER, **keys), planner_of(tmp_path, RECOVER)
    assert own.cache.raw < default.cache.raw


LIVE = [{"model.init_args.terms": f"[{STATES}]"}, {"model.init_args.distillation.init_args.tail": 2.0}]


@pytest.mark.parametrize("keys", LIVE)
def test_a_plan_refuses_what_the_run_would(keys: dict[str, Any], tmp_path: Path) -> None:
    """And it recommends no cache, which would not do."""
    assert planner_of(tmp_path, RECOVER, **keys).needs_live
    assert not planner_of(tmp_path, RECOVER).needs_live
    keys = {**keys, "model.init_args.teacher": "src.teachers.CachedTeacher"}
    with pytest.raises(ConfigError, match=r"src\.teachers\.LiveTeacher"):
        planner_of(tmp_path, RECOVER, **keys).trace()


def test_a_plan_counts_the_whole_distribution(tmp_path: Path) -> None:
    """The teacher's log-probabilities of all positions, and no operation more."""
    plain, tailed = (
        planner_of(tmp_path, RECOVER, **{"model.init_args.distillation.init_args.tail": tail}).trace()
        for tail in (0, 1)
    )
    assert tailed.peak["loss chunk"] - plain.peak["loss chunk"] >= 4 * ROWS * (LENGTH - 1) * V
    assert tailed.flops == plain.flops
