"""What a user gets wrong ends in one clear message that names the key, exit status 2, and nothing written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModel

from src.cli import main
from src.mask import Mask

SEARCH = "configs/search/gumbel_topk.yaml"
RECOVER = "configs/recover/entropy_kd.yaml"


@pytest.fixture
def fails(
    tmp_path: Path, teacher_dir: str, corpus_file: str, mask_file: str, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Run a verb with something wrong in it; return what the user is told."""

    def check(config: str, *wrong: str, **paths: str) -> str:
        out = tmp_path / "logs"
        given = {"model.init_args.model": teacher_dir, "data.init_args.train": corpus_file} | paths
        given |= {"data.init_args.validation": corpus_file, "trainer.logger.init_args.save_dir": str(out)}
        if config == RECOVER and "model.init_args.mask" not in paths:
            given["model.init_args.mask"] = mask_file
        with pytest.raises(SystemExit) as stop:
            main(["fit", "--config", config, "--trainer.max_steps=2", "--trainer.accelerator=cpu"]
                 + [f"--{k}={v}" for k, v in given.items()] + list(wrong))  # fmt: skip
        assert stop.value.code == 2
        message = capsys.readouterr().err
        error = message[message.index("error:") :]
        assert "Traceback" not in message
        assert "usage:" not in message
        assert len(error.strip().splitlines()) <= 12, error
        assert not list(out.rglob("mask.json"))
        assert not list(out.rglob("*.ckpt"))
        return error

    return check


def test_unknown_model(fails: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else it is asked five times
    message = fails(SEARCH, **{"model.init_args.model": "no/such-directory"})
    assert "no/such-directory" in message
    assert "Hub id" in message


def test_encoder_only_model(fails: Any, tmp_path: Path) -> None:
    tiny = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    AutoModel.from_config(AutoConfig.for_model("bert", vocab_size=99, **tiny)).save_pretrained(
        tmp_path / "bert"
    )
    assert "encoder" in fails(SEARCH, **{"model.init_args.model": str(tmp_path / "bert")})


@pytest.mark.parametrize("remove", [0, -3, 6, 99])
def test_impossible_number_of_layers(fails: Any, remove: int) -> None:
    message = fails(SEARCH, "--model.init_args.ratio=null", f"--model.init_args.remove={remove}")
    assert "remove" in message
    assert "Accepted: 1 to 5" in message


@pytest.mark.parametrize("ratio", [0, 1, -0.2, 1.5])
def test_ratio_outside_the_unit_interval(fails: Any, ratio: float) -> None:
    assert "model.ratio" in fails(SEARCH, f"--model.init_args.ratio={ratio}")


def test_neither_count_nor_ratio(fails: Any) -> None:
    message = fails(SEARCH, "--model.init_args.ratio=null")
    assert "model.remove" in message
    assert "model.ratio" in message


def test_misspelt_key_gets_a_suggestion(fails: Any) -> None:
    message = fails(SEARCH, "--model.init_args.rato=0.25")
    assert "rato" in message
    assert "Did you mean" in message
    assert "ratio" in message


def test_misspelt_trainer_key_gets_a_suggestion(fails: Any) -> None:
    message = fails(SEARCH, "--trainer.max_stesp=3")
    assert "max_stesp" in message
    assert "max_steps" in message


def test_wrong_type(fails: Any) -> None:
    message = fails(SEARCH, "--model.init_args.draws=many")
    assert "draws" in message
    assert "many" in message


def test_unknown_policy_form(fails: Any) -> None:
    assert "form" in fails(SEARCH, "--model.init_args.policy.init_args.form=hard")


def test_missing_corpus(fails: Any) -> None:
    assert "nowhere.jsonl" in fails(SEARCH, **{"data.init_args.train": "nowhere.jsonl"})


def test_empty_corpus(fails: Any, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "empty.jsonl" in fails(SEARCH, **{"data.init_args.train": str(empty)})


def test_unreadable_corpus(fails: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"question": "a"\nnot json\n')
    assert "broken.jsonl" in fails(SEARCH, **{"data.init_args.train": str(broken)})


def test_row_without_the_column(fails: Any, tmp_path: Path, corpus_file: str) -> None:
    lines = Path(corpus_file).read_text().splitlines()
    lines[3] = json.dumps({"question": "How many?"})
    holed = tmp_path / "holed.jsonl"
    holed.write_text("\n".join(lines) + "\n")
    message = fails(SEARCH, **{"data.init_args.train": str(holed)})
    assert "answer" in message
    assert "4" in message, "the row is named"


def test_tokenizer_larger_than_the_vocabulary(fails: Any, tmp_path: Path) -> None:
    from src.data.arithmetic import build_tokenizer

    tokenizer = build_tokenizer()
    tokenizer.add_tokens([f"<new{i}>" for i in range(50)])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    message = fails(SEARCH, f"--data.init_args.tokenizer={tmp_path / 'tokenizer'}")
    assert "tokenizer" in message
    assert "vocabulary" in message


def test_mask_of_another_model(fails: Any, tmp_path: Path) -> None:
    Mask(model="other", num_layers=9, keep=(0, 1), method="test").save(tmp_path / "other.json")
    message = fails(RECOVER, **{"model.init_args.mask": str(tmp_path / "other.json")})
    assert "9 layers" in message


def test_missing_and_broken_mask(fails: Any, tmp_path: Path) -> None:
    assert "gone.json" in fails(RECOVER, **{"model.init_args.mask": "gone.json"})
    (tmp_path / "half.json").write_text('{"keep": [0')
    assert "not JSON" in fails(RECOVER, **{"model.init_args.mask": str(tmp_path / "half.json")})


def test_output_directory_that_cannot_be_written(fails: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    message = fails(SEARCH, f"--trainer.logger.init_args.save_dir={tmp_path / 'file' / 'logs'}")
    assert str(tmp_path / "file") in message


def test_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["exprot"])
    assert stop.value.code == 2
    assert "Did you mean 'export'?" in capsys.readouterr().err


def test_several_faults_are_told_together(fails: Any) -> None:
    message = fails(SEARCH, "--model.init_args.distillation.init_args.k=0",
                    "--model.init_args.distillation.init_args.temperature=-1")  # fmt: skip
    assert "distillation.k: 0 given" in message
    assert "distillation.temperature: -1.0 given" in message
