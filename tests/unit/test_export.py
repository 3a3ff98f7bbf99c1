"""The export command: what lands in the directory, and what must never land there."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from src.errors import ConfigError
from src.export import card as cards
from src.export.observe import proof_tokens
from src.mask import Mask
from src.models.cut import cut

KEEP = (0, 2, 3, 5)


def recovered(mask_file: str, path: Path) -> tuple[Path, PreTrainedModel]:
    """A checkpoint as a recovery leaves it, and the student it holds."""
    mask = Mask.load(mask_file)
    student = cut(AutoModelForCausalLM.from_pretrained(mask.model), mask)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.25)
    state = {f"model.{name}": tensor for name, tensor in student.state_dict().items()}
    record = {"tokens": 4321, "scope": "full", "rank": 16, "keep": list(KEEP)}
    torch.save({"state_dict": state, "recovery": record}, path)
    return path, student


@pytest.mark.fresh
def test_a_plain_directory_with_everything_that_belongs_to_the_model(
    run: Callable[..., Path], teacher_dir: str, mask_file: str
) -> None:
    teacher = Path(teacher_dir)
    out = run("--license", "mit", "--data", "forty problems")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (teacher / name).read_bytes()
    assert Mask.load(out / "mask.json") == Mask.load(mask_file)
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == len(config["layer_types"]) == len(KEEP)
    assert config["depth_pruning"] == {"parent": teacher.name, "revision": None, "keep": list(KEEP)}
    card = (out / "README.md").read_text()
    assert cards.front_matter(out / "README.md")["license"] == "mit"
    for fact in (
        str(list(KEEP)),
        "removed [1, 4]",
        "forty problems",
        "none: the kept layers hold the parent's",
    ):
        assert fact in card
    assert str(teacher.parent) not in card
    assert {path.name for path in out.parent.iterdir()} == {"out", "mask.json"}


def test_a_checkpoint_is_what_is_exported(run: Callable[..., Path], mask_file: str, tmp_path: Path) -> None:
    path, student = recovered(mask_file, tmp_path / "last.ckpt")
    out = run("--checkpoint", str(path))
    loaded = AutoModelForCausalLM.from_pretrained(out)
    for name, tensor in student.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    card = (out / "README.md").read_text()
    assert "distilled from the parent on 4,321 tokens (full)" in card
    assert "logits = original, parent's weights" in card  # the law of the cut is proven all the same


def test_stored_in_another_type_the_proof_still_needs_equal_bits(run: Callable[..., Path]) -> None:
    out = run("--dtype", "bfloat16")
    assert {p.dtype for p in AutoModelForCausalLM.from_pretrained(out).parameters()} == {torch.bfloat16}
    assert "logits = original | equal to the last bit" in (out / "README.md").read_text()


def test_weights_stored_in_fewer_bits_than_trained_are_told(
    run: Callable[..., Path], mask_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, student = recovered(mask_file, tmp_path / "last.ckpt")
    out = run("--checkpoint", str(path), "--dtype", "bfloat16")
    card = (out / "README.md").read_text()
    told = re.search(r"\| no: (weights rounded .* as trained) \|", card)
    assert told is not None
    ids_BT = proof_tokens(student.config)
    with torch.no_grad():
        before_BTV = student(ids_BT).logits
        for tensor in student.state_dict().values():
            tensor.copy_(tensor.bfloat16())
        moved, scale = (student(ids_BT).logits - before_BTV).abs().max(), before_BTV.abs().max()
    assert moved > 1e-3
    assert told.group(1) == (
        f"weights rounded float32 -> bfloat16; logits moved by {moved:.1e} of {scale:.1f}; "
        f"--dtype float32 stores them as trained"
    )
    mask, checks = (
        Mask.load(out / "mask.json"),
        len(re.findall(r"^\| .* \|$", card.partition("## Proof")[2], re.M)) - 1,
    )
    assert capsys.readouterr().out.splitlines() == [
        f"{out}: {mask}",
        f"proven in a fresh process, logits equal to the last bit; all {checks} checks: {out}/README.md",
        f"note: stored as trained: no: {told.group(1)}",
    ]
    loaded = AutoModelForCausalLM.from_pretrained(out)
    for name, tensor in student.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.bfloat16())
    assert "weights rounded" not in (run("--checkpoint", str(path), "--force") / "README.md").read_text()


def test_a_tokenizer_that_cannot_be_read_is_told(
    run: Callable[..., Path], teacher_dir: str, tmp_path: Path
) -> None:
    assert "tokenizer | not checked" not in (run() / "README.md").read_text()
    bare = shutil.copytree(teacher_dir, tmp_path / "bare", ignore=shutil.ignore_patterns("*token*"))
    card = (run("--force", "--model", str(bare)) / "README.md").read_text()
    assert "| tokenizer | not checked: none can be read from the parent |" in card
    for broken in ("{broken", '{"model": {}}', ""):
        (bare / "tokenizer.json").write_text(broken)
        with pytest.raises(
            ConfigError, match=r"tokenizer: cannot read one from .* would pass these files on"
        ):
            run("--force", "--model", str(bare))


def test_scores_of_an_evaluation_go_into_the_card(run: Callable[..., Path], tmp_path: Path) -> None:
    out, scores = run(), tmp_path / "scores.json"
    parent, own = {"exact_match": 0.9, "kl": 0.0}, {"path": str(out), "exact_match": 0.85, "kl": 0.0123}
    evaluation = {"teacher": parent, "models": [own], "rows": 600, "command": "evaluate ..."}
    scores.write_text(json.dumps(evaluation))
    cards.main([str(out), "--scores", str(scores)])
    card = (out / "README.md").read_text()
    assert "| exact match | 90.0% | 85.0% |" in card
    assert cards.NO_SCORES not in card
    scores.write_text(json.dumps({**evaluation, "models": [{**own, "path": "elsewhere"}]}))
    with pytest.raises(ConfigError, match="found \\['elsewhere'\\]"):
        cards.main([str(out), "--scores", str(scores)])


@pytest.mark.parametrize("relation", ["quantized", "finetune", None])
def test_a_card_names_what_a_parent_on_this_machine_holds_only_where_the_parent_says_so(
    relation: str | None, tmp_path: Path
) -> None:
    """A fine-tuned parent is another model than its base."""
    told = {"license": "mit", "base_model": "a/b", "base_model_relation": relation}
    text = cards.model_card(Mask.by_hand(str(tmp_path), 4, [0, 1]), (10, 5), [], told)
    (tmp_path / "README.md").write_text(text)
    card = cards.front_matter(tmp_path / "README.md")
    assert (card["license"], card.get("base_model")) == ("mit", "a/b" if relation == "quantized" else None)
