"""What a model directory claims is checked against what it holds, before a step is spent on it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from src.cli import main
from src.mask import Mask
from src.models.loading import load_model
from tests.faults.directories import altered, command, crossed, recovery, refused, search

LAYERS = 6


def masked(model: Path | str, path: Path, layers: int = LAYERS) -> Path:
    """A mask of a model, in a file."""
    Mask(model=str(model), num_layers=layers, keep=(0, 2, 3, 5), method="test").save(path)
    return path


def whole(*_: Any) -> None:
    """Leave the weights alone."""


def truncated(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def empty(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"")


def foreign_format(model: Path) -> None:
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def foreign_names(model: Path) -> None:
    save_file({"encoder.weight": torch.ones(3)}, model / "model.safetensors", {"format": "pt"})


def foreign_shapes(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    key = "model.layers.0.mlp.up_proj.weight"
    save_file(
        weights | {key: weights[key][:, :-1].contiguous()}, model / "model.safetensors", {"format": "pt"}
    )


def gone_shard(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def broken_index(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text('{"weight_map": [')


TYPES = ["full_attention"]


def claimed(changes: dict[str, Any]) -> int:
    """Layers that a config will say it has, where that is a number."""
    count = changes.get("num_hidden_layers", LAYERS)
    return count if isinstance(count, int) else LAYERS


LIES: list[tuple[dict[str, Any], Callable[[Path], None], str]] = [
    ({"num_hidden_layers": 5, "layer_types": TYPES * 5}, whole, "says 5 layers.*its weights hold 6"),
    ({"num_hidden_layers": 4, "layer_types": TYPES * 4}, whole, "says 4 layers.*its weights hold 6"),
    ({"num_hidden_layers": 7, "layer_types": TYPES * 7}, whole, "says 7 layers.*its weights hold 6"),
    ({"num_hidden_layers": 0, "layer_types": None}, whole, "num_hidden_layers is 0.*1 or more"),
    (
        {"num_hidden_layers": -2, "layer_types": None},
        whole,
        "num_hidden_layers is -2.*a whole number up to 1024",
    ),
    ({"num_hidden_layers": 10**7, "layer_types": None}, whole, "num_hidden_layers is 10000000.*up to 1024"),
    ({"num_hidden_layers": "6"}, whole, "num_hidden_layers is '6'.*a whole number"),
    ({"num_hidden_layers": 6.5}, whole, r"num_hidden_layers is 6\.5.*a whole number"),
    ({"vocab_size": "many"}, whole, "vocab_size"),
    ({"hidden_size": [16]}, whole, "hidden_size"),
    ({"hidden_size": 17}, whole, "cannot load"),
    ({"num_attention_heads": 0}, whole, "model: cannot"),
    ({"layer_types": "full_attention"}, whole, "layer_types"),
    ({"hidden_act": "swoosh"}, whole, "hidden_act: 'swoosh'"),
    ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, whole, "spiral"),
    ({"model_type": "no_such_family"}, whole, "no_such_family"),
    ({"model_type": None}, whole, "model_type"),
    ({"architectures": 7}, whole, "architectures"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, whole, "cannot load.*optimum|GPTQ|gptq"),
    ({"dtype": "float23"}, whole, "float23"),
    ({}, truncated, r"model\.safetensors' holds no weights that can be read.*download it again"),
    ({}, empty, r"model\.safetensors' holds no weights that can be read"),
    ({}, foreign_format, r"model\.safetensors' holds no weights that can be read"),
    ({}, foreign_names, "lacks .* weights"),
    ({}, foreign_shapes, "cannot load"),
    ({}, gone_shard, "names 2 files, of which 1 are missing.*00002-of-00002"),
    ({}, broken_index, r"index\.json' is no index of weights"),
]


@pytest.mark.parametrize(
    ("changes", "damage", "message", "verb"), crossed(LIES, ("export", "search", "evaluate"))
)
def test_a_directory_that_is_not_what_it_says_is_refused(
    changes: dict[str, Any],
    damage: Callable[[Path], None],
    message: str,
    verb: str,
    teacher_dir: str,
    corpus_file: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, mask = altered(teacher_dir, tmp_path / "model", **changes), tmp_path / "mask.json"
    damage(model)
    Mask(str(model), max(3, min(7, claimed(changes))), (0, 2), "test").save(mask)
    told = " ".join(refused(command(verb, model, mask, corpus_file, tmp_path), capsys).split())
    assert re.search(message, told), told
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("logs/**/mask.json"))


@pytest.mark.parametrize("said", [None, "float32", "bfloat16"])
def test_the_type_that_is_stored_is_the_one_that_the_files_hold(
    said: str | None, teacher_dir: str, tmp_path: Path
) -> None:
    AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    altered(teacher_dir, tmp_path / "model", dtype=said, torch_dtype=None)
    (tmp_path / "half" / "model.safetensors").replace(tmp_path / "model" / "model.safetensors")
    mask = masked(tmp_path / "model", tmp_path / "mask.json")
    main(["export", "--mask", str(mask), "--out", str(tmp_path / "out")])
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_model(str(tmp_path / "model"), dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["auto"])
def test_dtype_auto_in_search_recovery_and_evaluation(
    dtype: str, teacher_dir: str, corpus_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.bfloat16)
    altered(teacher_dir, tmp_path / "model")
    half.save_pretrained(tmp_path / "model")
    asked = f"--model.init_args.dtype={dtype}"
    main(search(tmp_path / "model", corpus_file, tmp_path, asked))
    mask = next(tmp_path.rglob("mask.json"))
    main(recovery(mask, corpus_file, tmp_path, asked))
    saved = next((tmp_path / "recover").rglob("last.ckpt"))
    state = torch.load(saved, weights_only=False)["state_dict"]
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    main(["evaluate", "--model", str(tmp_path / "model"), "--data", corpus_file, "--dtype", dtype,
          "--limit", "4", "--no-exact-match", "--out", str(tmp_path / "scores.json")])  # fmt: skip
    assert json.loads((tmp_path / "scores.json").read_text())["dtype"] == "bfloat16"


def test_a_head_of_its_own_under_a_flag_of_tied_embeddings_is_kept_to_the_end(
    teacher_dir: str, corpus_file: str, tmp_path: Path
) -> None:
    """Search, recovery and export see one model: the one in the file."""
    model = altered(teacher_dir, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match="says tie_word_embeddings and holds an output head that differs"):
        parent = load_model(str(model))
    head, words = parent.get_output_embeddings().weight, parent.get_input_embeddings().weight
    assert torch.equal(head, words.flip(0))
    main(search(model, corpus_file, tmp_path))
    mask = next(tmp_path.rglob("mask.json"))
    main(recovery(mask, corpus_file, tmp_path))
    checkpoint = next((tmp_path / "recover").rglob("last.ckpt"))
    main(
        ["export", "--mask", str(mask), "--checkpoint", str(checkpoint), "--out", str(tmp_path / "recovered")]
    )
    main(["export", "--mask", str(mask), "--out", str(tmp_path / "plain")])
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert torch.equal(plain["lm_head.weight"], weights["lm_head.weight"])
    for out in (tmp_path / "plain", tmp_path / "recovered"):
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
        stock = AutoModelForCausalLM.from_pretrained(out)
        assert not torch.equal(stock.get_output_embeddings().weight, stock.get_input_embeddings().weight)


def test_an_equal_head_under_the_flag_stays_tied(teacher_dir: str, tmp_path: Path) -> None:
    model = altered(teacher_dir, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    mask = masked(model, tmp_path / "mask.json")
    main(["export", "--mask", str(mask), "--out", str(tmp_path / "out")])
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


CARDS = [
    b"---\nlicense: mit\nname: caf\xe9\n---\n",
    b"---\nlicense: [mit\n---\n",
    b"---\nlicense: !!python/object/apply:os.system ['true']\n---\n",
    b"\xff\xfe-\x00-\x00-\x00",
    b"---\n" + b"[" * 5000 + b"\n---\n",
    b"---\nlicense: 2024-99-99\n---\n",
]


@pytest.mark.parametrize("card", CARDS)
def test_a_card_of_the_parent_is_no_reason_to_lose_an_export(
    card: bytes, teacher_dir: str, tmp_path: Path
) -> None:
    model = altered(teacher_dir, tmp_path / "model")
    (model / "README.md").write_bytes(card)
    main(["export", "--mask", str(masked(model, tmp_path / "mask.json")), "--out", str(tmp_path / "out")])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 4
    told = (tmp_path / "out" / "README.md").read_text()
    assert ("| Licence | mit |" in told) == card.startswith(b"---\nlicense: mit")
