"""The preview shows what is trained: the marks hold exactly the supervised text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from src.data import preview
from src.errors import ConfigError
from src.mask import Mask
from tests.data_tools import CHATML, byte_tokenizer, write_rows

ROWS = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(9)]
CHAT = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": f"Hello {i}"}]}
    for i in range(9)
]


def config(folder: Path, rows: list[Any], template: str | None = None, **options: Any) -> str:
    byte_tokenizer(template).save_pretrained(folder / "tokenizer")
    keys = {"train": write_rows(folder / "a.jsonl", rows), "max_length": 99, **options}
    experiment = {
        "model": {"class_path": "src.search.MaskSearch", "init_args": {"model": str(folder / "tokenizer")}},
        "data": {"class_path": "src.data.Corpus", "init_args": keys},
        "trainer": {"max_steps": 1},
    }
    (folder / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    return str(folder / "experiment.yaml")


@pytest.mark.parametrize("packing", ["padded", "documents"])
def test_marks_hold_the_answers(tmp_path, capsys, packing):
    preview.main(["--config", config(tmp_path, ROWS, packing=packing), "--data.supervise", "answer"])
    text = capsys.readouterr().out
    found = re.findall(
        r"--- row \d: \d+ tokens, \d+ supervised\nWhat is (\d)\?\n\{\+It is (\d)\.</s>\+\}", text
    )
    assert len(found) == 3
    assert all(asked == answered for asked, answered in found)


def test_a_chat_shows_its_template(tmp_path, capsys):
    path = config(tmp_path, CHAT, CHATML, supervise="answer")
    preview.main(["--config", path, "--rows", "1"])
    text = capsys.readouterr().out
    assert re.search(r"<\|im_start\|>assistant\n\{\+Hello \d<\|im_end\|>\+\}\n", text)


def test_faults_of_the_preview(tmp_path):
    path = config(tmp_path, ROWS)
    for argv, message in [
        (["--config", str(tmp_path / "missing.yaml")], "gives no data section"),
        (["--config", path, "--data.supervse", "all"], "Option 'supervse' is not accepted"),
        (["--config", path, "--rows", "0"], "'0' given; accepted: a whole number above 0"),
        (["--config", path, "--split", "validation"], "data.validation is not set"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(message)):
            preview.main(argv)


def test_overlays_of_columns_and_mixtures_survive_a_change(tmp_path, capsys):
    """Keys given in a file and on the command line together, as LightningCLI parses them."""
    rows = [{"q": "Q", "a": f"A{i}", "story": "S"} for i in range(9)]
    path = config(tmp_path, rows, columns={"prompt": "q", "answer": "a"})
    extra = ["--data.supervise", "answer", "--data.batch_size", "2"]
    preview.main(["--config", path, "--rows", "1", *extra])
    assert "{+A" in capsys.readouterr().out
    train = [{"path": str(tmp_path / "a.jsonl"), "weight": 1}]
    preview.main(["--config", config(tmp_path, rows, train=train, columns={"text": "story"}), *extra])
    assert capsys.readouterr().out.count("{+S</s>+}") == 3


def test_a_recovery_takes_the_tokenizer_from_its_mask_as_fit_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = yaml.safe_load(Path(config(tmp_path, ROWS)).read_text())
    model = experiment["model"]["init_args"].pop("model")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(experiment))
    with pytest.raises(ValueError, match=r"data\.tokenizer"):
        preview.main(["--config", str(tmp_path / "config.yaml")])
    Mask(model, 3, (0, 2), "test").save(tmp_path / "mask.json")
    asked = ["--model.init_args.mask", str(tmp_path / "mask.json"), "--rows", "1"]
    preview.main(["--config", str(tmp_path / "config.yaml"), *asked])
    assert "What is" in capsys.readouterr().out
