"""Soft prompts from their distillation to an export: by a repair, a recovery that it begins, a search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from src.cli import main, run
from src.errors import ConfigError
from src.mask import Mask
from src.models.cut import cut
from src.models.loading import load_model
from src.prompts import DistilledCalibration
from tests.integration.test_overlays import SEARCH, arguments
from tests.integration.test_resume import broken_and_resumed
from tests.numerics.test_prompts import prompts_of

CONFIG = "configs/prompts/distilled_calibration.yaml"
SMALL = {
    "model.init_args.prompts": 4, "model.init_args.inner": "{steps: 3, rate: 2.0, window: 2, spread: 1}",
    "model.init_args.validate_every": 2,
}  # fmt: skip


def distil(out: Path, corpus: str, *extra: str, **keys: Any) -> DistilledCalibration:
    given = arguments(out, corpus, **{"trainer.max_steps": 3, **SMALL, **keys})
    module: DistilledCalibration = run(["fit", "--config", CONFIG, *given, *extra]).model
    return module


@pytest.mark.slow
def test_prompts_are_distilled_for_a_mask_repair_its_cut_and_are_exported_with_it(
    tmp_path: Path, teacher_dir: str, mask_file: str, corpus_file: str
) -> None:
    keys = {"model.init_args.mask": mask_file, "model.init_args.starts": 3}
    done = distil(tmp_path, corpus_file, **keys)
    assert done.figures["kl_start"] == min(done.figures["kl_starts"])
    assert done.figures["kl_distilled"] != done.figures["kl_start"]
    assert len(done.figures["kl_starts"]) == 3
    assert [name for name, _ in done.named_parameters()] == ["prompts"], "the parent is in no checkpoint"
    made, out = tmp_path / "prompts" / "run" / "distilled.prompts.safetensors", tmp_path / "out"
    assert load_file(made)["embeds"].shape == (4, 16, 16)
    main(["patch", "--method=mask_tuning", "--mask", mask_file, "--data", str(made), "--out", str(out)])
    assert "on 4 soft prompts (64 positions)" in (out / "README.md").read_text()
    ids, bare = torch.arange(3, 20)[None], cut(load_model(teacher_dir), Mask.load(mask_file))
    assert not torch.equal(AutoModelForCausalLM.from_pretrained(out)(ids).logits, bare(ids).logits)
    keys = {
        "trainer.max_steps": 1, "model.init_args.mask": mask_file,
        "model.init_args.patch.init_args.data": made,
    }  # fmt: skip
    configs = ["configs/recover/entropy_kd.yaml", "configs/recover/mask_tuning.yaml"]
    run(["fit", *(f"--config={c}" for c in configs), *arguments(tmp_path, corpus_file, **keys)])
    last, again = tmp_path / "recover" / "run" / "checkpoints" / "last.ckpt", tmp_path / "recovered"
    main(["export", "--mask", mask_file, "--checkpoint", str(last), "--out", str(again)])
    assert "4 soft prompts" in (again / "README.md").read_text()


@pytest.mark.slow
def test_a_search_by_prompts_is_that_by_the_rows_that_they_embed(
    tmp_path: Path, teacher_dir: str, corpus_file: str
) -> None:
    """Distilled for drawn masks, they serve a search too; those of another model are refused."""
    rows, whole = tmp_path / "rows.jsonl", tmp_path / "rows.prompts.safetensors"
    rows.write_text("".join(Path(corpus_file).read_text().splitlines(True)[:6]))
    prompts_of(teacher_dir, str(rows)).save(whole)
    keys = {"model.init_args.model": teacher_dir, "model.init_args.calibration_batches": 9}
    search = ["fit", "--config", SEARCH, "--config", "configs/policy/layer_kl.yaml"]
    overlay = ["--config", "configs/search/soft_prompts.yaml"]

    def found(name: str, *extra: str) -> Mask:
        run([*search, *extra, *arguments(tmp_path / name, corpus_file, **keys),
             "--data.init_args.validation", str(rows)])  # fmt: skip
        return Mask.load(tmp_path / name / "search" / "run" / "mask.json")

    by_rows, by_prompts = found("a"), found("b", *overlay, f"--data.init_args.prompts={whole}")
    assert by_prompts.keep == by_rows.keep
    assert by_prompts.metrics["kl"] == pytest.approx(by_rows.metrics["kl"], rel=1e-4)
    distil(tmp_path, corpus_file, **{"model.init_args.model": teacher_dir, "model.init_args.remove": 2})
    made = tmp_path / "prompts" / "run" / "distilled.prompts.safetensors"
    mask = found("c", *overlay, f"--data.init_args.prompts={made}")
    assert mask.metrics["kl"] != by_rows.metrics["kl"]
    main(["export", "--mask", str(tmp_path / "c/search/run/mask.json"), "--out", str(tmp_path / "out")])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == mask.depth


@pytest.mark.slow
def test_killed_and_resumed_prompts_equal_the_uninterrupted(
    tmp_path: Path, teacher_dir: str, corpus_file: str
) -> None:
    extra = [f"--{key}={value}" for key, value in {**SMALL, "model.init_args.remove": 2}.items()]
    broken_and_resumed(CONFIG, tmp_path, *extra, teacher=teacher_dir, corpus=corpus_file)
    runs = [tmp_path / name for name in ("whole", "broken")]
    one, other = (load_file(next(run.rglob("*.prompts.safetensors"))) for run in runs)
    assert all(torch.equal(one[name], other[name]) for name in one)
    states = [torch.load(run / "step=8.ckpt", weights_only=False)["prompts"] for run in runs]
    assert states[0] == states[1]


def test_the_outer_gradient_is_clipped_at_twice_its_usual_norm(teacher_dir: str) -> None:
    stage = DistilledCalibration(model=teacher_dir, remove=2)
    stage.prompts = torch.nn.Parameter(torch.zeros(4))
    optimizer = stage.configure_optimizers()
    norms = list[float]()
    for size in (1.0, 1.5, 10.0):  # the average: 1, 1.05, 1.945
        stage.prompts.grad = torch.tensor([0.6, 0.8, 0.0, 0.0]) * size
        stage.on_before_optimizer_step(optimizer)
        norms.append(float(stage.prompts.grad.norm()))
    assert norms == pytest.approx([1.0, 1.5, 2.1])
    assert stage.usual == pytest.approx(1.945)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--model.init_args.model=m"], r"model\.mask, model\.remove: give one"),
        (["--model.init_args.model=DIR", "--model.init_args.remove=5"], r"model\.remove: 5 .* at most 4"),
        (["--model.init_args.model=DIR", "--model.init_args.remove=2", "--trainer.precision=bf16-mixed"],
         r"trainer\.precision: bf16-mixed given; accepted: 32-true"),
        (["--model.init_args.model=DIR", "--model.init_args.remove=2",
          "--model.init_args.inner={steps: 2, rate: 1.0, window: 2, spread: 1}"], r"model\.inner: window 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_distilled_is_refused(
    given: list[str], said: str, tmp_path: Path, teacher_dir: str, corpus_file: str
) -> None:
    argv = [word.replace("DIR", teacher_dir) for word in given]
    with pytest.raises(ConfigError, match=said):
        run(["fit", "--config", CONFIG, *argv, *arguments(tmp_path, corpus_file)])
    assert not list(tmp_path.iterdir())


def test_a_plan_says_that_it_does_not_know_prompts(teacher_dir: str, corpus_file: str) -> None:
    argv = [f"--model.init_args.model={teacher_dir}", "--model.init_args.remove=2"]
    with pytest.raises(ConfigError, match="'DistilledCalibration' cannot be planned"):
        run(["plan", "--config", CONFIG, *argv, f"--data.init_args.train={corpus_file}"])
