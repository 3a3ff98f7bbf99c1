"""Fast post-training pruning from the search to the export, of every unit: no step trains a weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from src.cli import main, run
from src.data.arithmetic import build_tokenizer
from src.mask import Mask, Unit
from src.models.cut import cut
from src.models.loading import load_model
from tests.integration.test_overlays import SEARCH, arguments
from tests.tiny import tiny_model

LAYERS, OVERLAY = 6, "configs/policy/fisher.yaml"
WIDTH = {"kv_group": 2, "channel": 48}
QUICK: tuple[Unit, ...] = ("half", "channel")


@pytest.fixture(scope="module")
def parent_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random 6-layer Llama of two KV heads and 48 channels, with the arithmetic tokenizer."""
    path, tokenizer = tmp_path_factory.mktemp("llama"), build_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer), num_hidden_layers=LAYERS).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize(
    "unit",
    [pytest.param(u, marks=() if u in QUICK else pytest.mark.slow) for u in (*QUICK, "layer", "kv_group")],
)
def test_a_mask_is_found_tuned_and_exported_without_training(
    unit: Unit, tmp_path: Path, parent_dir: str, corpus_file: str
) -> None:
    given = {
        "model.init_args.model": parent_dir, "model.init_args.calibration_batches": 2,
        "model.init_args.unit": unit, "model.init_args.policy.init_args.rearranged": "true",
    }  # fmt: skip
    run(["fit", "--config", SEARCH, "--config", OVERLAY, *arguments(tmp_path, corpus_file, **given)])
    mask_file = tmp_path / "search" / "run" / "mask.json"
    mask = Mask.load(mask_file)
    assert (mask.method, mask.unit, mask.width) == ("Fisher", unit, WIDTH.get(unit))
    assert len(mask.removed) == {"layer": 2, "half": 4, "kv_group": 6, "channel": 6 * 12}[unit]
    assert mask.metrics["kl"] == mask.metrics["kl_learned"]
    out = tmp_path / "tuned"
    argv = ["--mask", str(mask_file), "--data", corpus_file, "--rows=8", "--out", str(out)]
    main(["patch", "--method=mask_tuning", *argv])
    assert "| logits = original | equal to the last bit |" in (out / "README.md").read_text()
    bare, tuned = cut(load_model(parent_dir), mask), AutoModelForCausalLM.from_pretrained(out)
    ids = torch.arange(3, 20)[None]
    assert not torch.equal(tuned(ids).logits, bare(ids).logits)
    assert {n: p.shape for n, p in tuned.named_parameters()} == {
        n: p.shape for n, p in bare.named_parameters()
    }
    moved = {n.split(".", 3)[-1] for n, p in tuned.named_parameters()
             if not torch.equal(p, bare.get_parameter(n))}  # fmt: skip
    assert moved <= {"self_attn.o_proj.weight", "mlp.down_proj.weight"}


def test_a_recovery_starts_from_tuned_scales_and_its_card_says_so(
    tmp_path: Path, teacher_dir: str, mask_file: str, corpus_file: str
) -> None:
    keys = {
        "trainer.max_steps": 1, "model.init_args.mask": mask_file,
        "model.init_args.patch.init_args.data": corpus_file, "model.init_args.patch.init_args.rows": 8,
    }  # fmt: skip
    configs = ["configs/recover/entropy_kd.yaml", "configs/recover/mask_tuning.yaml"]
    run(["fit", *(f"--config={c}" for c in configs), *arguments(tmp_path, corpus_file, **keys)])
    checkpoint, out = tmp_path / "recover" / "run" / "checkpoints" / "last.ckpt", tmp_path / "out"
    main(["export", "--mask", mask_file, "--checkpoint", str(checkpoint), "--out", str(out)])
    assert "scales of attention heads and feed-forward channels fitted to" in (out / "README.md").read_text()
    assert AutoConfig.from_pretrained(out).num_hidden_layers == 4
