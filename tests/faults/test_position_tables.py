"""A table of positions ends in words: rows are cut where the user allowed it, and else refused by key."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel

from src.cli import main
from src.data.arithmetic import build_tokenizer
from src.errors import ConfigError
from src.export.observe import proof_tokens
from src.mask import Mask
from src.models.cut import cut
from src.models.loading import load_model
from src.models.positions import position_limit, positions_of
from tests.faults.directories import recovery, refused, search
from tests.tiny import LAYERS, tiny_model

PLACES = 40
TABLES = ("gpt2", "opt", "gpt_neo", "openai-gpt", "gptj", "ctrl", "biogpt", "codegen")
NONE = ("llama", "gpt_neox", "bloom", "phi", "xglm", "mamba")


def model_of(family: str, vocabulary: int = 97) -> PreTrainedModel:
    """A tiny model with few positions."""
    sizes = {"max_position_embeddings": PLACES}
    if family in ("gpt2", "openai-gpt", "gptj", "ctrl", "codegen"):
        sizes["n_positions"] = PLACES
    if family in ("gptj", "codegen"):
        sizes["rotary_dim"] = 4
    return tiny_model(family, vocab_size=vocabulary, **sizes)


@pytest.fixture(scope="module", params=["gpt2", pytest.param("opt", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a short table, in a directory with the arithmetic tokenizer."""
    path, tokenizer = tmp_path_factory.mktemp(request.param), build_tokenizer()
    model_of(request.param, len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def mask(model: Path, tmp_path: Path) -> Path:
    """A mask of the model."""
    Mask(model=str(model), num_layers=LAYERS, keep=(0, 2, 3, 5), method="test").save(tmp_path / "mask.json")
    return tmp_path / "mask.json"


@pytest.mark.parametrize("family", TABLES)
def test_a_table_is_found_and_its_end_is_the_last_row_that_runs(family: str, tmp_path: Path) -> None:
    model_of(family).save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert position_limit(model) == PLACES
    kept = cut(model, Mask(str(tmp_path), LAYERS, (0, 2, 3, 5), "test"))
    for each in (model, kept):
        with torch.no_grad():
            assert each(torch.full((1, PLACES), 5)).logits.shape[1] == PLACES
            with pytest.raises(ConfigError, match=rf"a row has {PLACES + 1} tokens.* ends at {PLACES}"):
                each(torch.full((1, PLACES + 1), 5))


@pytest.mark.parametrize("family", NONE)
def test_positions_without_a_table_have_no_end(family: str, tmp_path: Path) -> None:
    model_of(family).save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert position_limit(model) is None
    with torch.no_grad():
        assert model(torch.full((1, PLACES + 9), 5)).logits.shape[1] == PLACES + 9


def test_rows_are_truncated_where_the_user_allowed_it_in_every_verb(
    model: Path, mask: Path, corpus_file: str, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=f"ends at {PLACES}: longer documents are truncated there"):
        main(search(model, corpus_file, tmp_path, "--data.init_args.too_long=truncate"))
    with pytest.warns(UserWarning, match=f"ends at {PLACES}: longer documents are truncated there"):
        main(recovery(mask, corpus_file, tmp_path, "--data.init_args.too_long=split"))
    main(["predict", "--config", "configs/cache/topk.yaml", f"--model.init_args.model={model}",
          f"--model.init_args.out={tmp_path / 'cache'}", f"--data.init_args.train={corpus_file}",
          "--trainer.accelerator=cpu", f"--trainer.logger.init_args.save_dir={tmp_path}"])  # fmt: skip
    main(
        [
            "patch",
            "--mask",
            str(mask),
            "--data",
            corpus_file,
            "--rows",
            "8",
            "--out",
            str(tmp_path / "repaired"),
        ]
    )
    main(["evaluate", "--teacher", str(model), "--model", str(tmp_path / "repaired"), "--data", corpus_file,
          "--limit", "8", "--no-exact-match", "--out", str(tmp_path / "scores.json")])  # fmt: skip
    judged = json.loads((tmp_path / "scores.json").read_text())["models"][0]
    assert 0 < judged["tokens"] < 8 * PLACES
    assert judged["kl"] > 0


def test_and_refused_by_key_where_not(
    model: Path, mask: Path, corpus_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, out = str(model), str(tmp_path / "out")
    for argv, message in (
        (search(model, corpus_file, tmp_path / "logs", "--data.init_args.too_long=error"),
         rf"data\.max_length is 256, and the position table of this '\w+' ends at {PLACES}"),
        (recovery(mask, corpus_file, tmp_path / "logs", "--data.init_args.too_long=error"),
         rf"data\.max_length is 256, .* ends at {PLACES}"),
        (["export", "--mask", str(mask), "--out", out, "--proof-tokens", "64"], "--proof-tokens 64"),
        (["evaluate", "--model", name, "--data", corpus_file, "--max-new-tokens", "64", "--out", out],
         "--max-new-tokens: the longest prompt has"),
        (["benchmark", "--baseline", name, "--model", name, "--prompt-tokens", "64", "--out", out],
         "--prompt-tokens 64"),
    ):  # fmt: skip
        told = " ".join(refused(argv, capsys).split())
        assert re.search(message, told), told
        assert not Path(out).exists()


@pytest.mark.parametrize("stated", [-1, 0])
def test_a_number_that_says_without_end_ends_nothing(stated: int) -> None:
    """XLNet's config says -1: a proof of it takes as many tokens as one of a model that says nothing."""
    config = LlamaConfig(vocab_size=64)
    usual = proof_tokens(config)
    config.max_position_embeddings = stated
    assert positions_of(config) is None
    assert torch.equal(proof_tokens(config), usual)
