"""Judging: free generation, exact divergences, flips, and what the command writes."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from src import command
from src.data.documents import Columns
from src.data.judging import read_rows
from src.errors import ConfigError
from src.evaluate.flips import difference, flips
from src.evaluate.generate import greedy, stop_tokens
from src.evaluate.intervals import interval
from src.evaluate.verb import exact_match, main
from tests.marks import slow
from tests.tiny import tiny_ids, tiny_model

QA = Columns(prompt="question", answer="answer")


# ---------------------------------------------------------------------- generation


@pytest.mark.parametrize(
    "family",
    ["llama", "qwen3", "gemma3_text", "gpt2", "bloom", "mamba", slow("falcon_mamba"), slow("qwen3_next")],
)
def test_padded_batches_generate_what_each_prompt_alone_generates(family: str) -> None:
    model = tiny_model(family)
    prompts = [tiny_ids(1, length, seed=length)[0].tolist() for length in (11, 3, 7, 11, 5)]
    alone = [plain_greedy(model, prompt, 9) for prompt in prompts]
    assert greedy(model, prompts, 9, frozenset(), batch_size=5) == alone
    assert greedy(model, prompts, 9, frozenset(), batch_size=2) == alone


def plain_greedy(model: PreTrainedModel, prompt: list[int], new: int) -> list[int]:
    """The definition: the whole text again for every token, no cache, no padding."""
    ids = torch.tensor([prompt])
    for _ in range(new):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", ["openai-gpt", "rwkv"])
def test_a_model_without_a_cache_is_refused_by_name(family: str) -> None:
    with pytest.raises(ConfigError, match=f"a '{family}' gives back no cache.* neither decoded nor timed"):
        greedy(tiny_model(family), [[3, 4, 5]], 2, frozenset())


def test_rows_that_stop_leave_the_batch_and_change_nothing() -> None:
    model = tiny_model("llama")
    prompts = tiny_ids(6, 8).tolist()
    free = greedy(model, prompts, 12, frozenset())
    stop = frozenset({free[0][2], free[1][5], free[4][0]})
    cut = [text[: next((i for i, t in enumerate(text) if t in stop), 12)] for text in free]
    assert len({len(text) for text in cut}) > 2, "the rows should stop at different times"
    assert greedy(model, prompts, 12, stop) == cut


def test_stop_tokens_are_the_tokenizers_and_all_of_the_checkpoints(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = tiny_model("llama")
    model.generation_config.eos_token_id = [5, 7]
    assert stop_tokens(model, tokenizer) == {5, 7, tokenizer.eos_token_id}


def test_exact_match_counts_right_final_answers(models, tokenizer, rows, monkeypatch) -> None:
    answers = [row["answer"] for row in rows]
    answers[0] = answers[0].replace("####", "The answer is")  # no marker: wrong
    answers[1] += "1"  # a digit too many: wrong
    answers[2] = "Another way. " + answers[2].rpartition(". ")[2]  # other words, same answer: right
    tokens = tokenizer(answers, add_special_tokens=False).input_ids
    monkeypatch.setattr("src.evaluate.verb.greedy", lambda *_: tokens)
    result = exact_match(models[0], tokenizer, rows)
    assert result["correct"] == [False, False, *[True] * 10]
    assert result["exact_match"] == 10 / 12


def test_exact_match_refuses_references_without_an_answer(models, tokenizer) -> None:
    with pytest.raises(ConfigError, match="row 1 does not end in '#### <number>'"):
        exact_match(models[0], tokenizer, [{"question": "What?", "answer": "42"}])


def test_flips_are_counted_with_their_exact_probability() -> None:
    teacher = [True] * 10 + [False] * 5
    assert flips(teacher, teacher) == {"lost": 0, "gained": 0, "p": 1.0}
    student = [False] * 6 + [True] * 4 + [True] + [False] * 4
    assert flips(student, teacher) == {"lost": 6, "gained": 1, "p": 2 * (1 + 7) / 2**7}
    assert flips([True] * 4000, [False] * 4000)["p"] == 0.0


@pytest.mark.parametrize(("lost", "gained"), [(140, 40), (60, 60), (30, 210)])
def test_a_difference_has_the_interval_of_items_that_are_resampled_in_pairs(lost: int, gained: int) -> None:
    """Of many items; of few, resampling them would know none that are not there."""
    items = 1500
    change = np.repeat([-1.0, 1.0, 0.0], [lost, gained, items - lost - gained])
    found, plain = difference({"lost": lost, "gained": gained}, items), interval(change[None], np.ones(items))
    assert found == {key: pytest.approx(plain[key], abs=2e-3) for key in plain}


def test_few_flips_leave_a_difference_open() -> None:
    """As McNemar's exact p does: 4 lost and none gained come by chance once in eight times."""
    assert difference({"lost": 0, "gained": 0}, 500) == {
        "value": 0.0, "low": pytest.approx(-1.96 / 502), "high": pytest.approx(1.96 / 502),
    }  # fmt: skip
    assert flips([False] * 4, [True] * 4)["p"] == 0.125
    found, other = difference({"lost": 4, "gained": 0}, 500), difference({"lost": 0, "gained": 4}, 500)
    assert found["low"] < found["value"] == -0.008 < 0 < found["high"]
    assert [found[key] for key in ("value", "low", "high")] == [
        -other[key] for key in ("value", "high", "low")
    ]


# ---------------------------------------------------------------------- the command


@pytest.fixture
def saved(tmp_path: Path, models, tokenizer, rows) -> Path:
    for name, model in zip(("student", "teacher"), models, strict=True):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_command_writes_every_figure_beside_the_teachers(saved: Path) -> None:
    main([*f"--model {saved}/student --teacher {saved}/teacher --data {saved}/test.jsonl".split(),
          *f"--limit 5 --max-new-tokens 4 --out {saved}/out/evaluate.json".split()])  # fmt: skip
    record = json.loads((saved / "out" / "evaluate.json").read_text())
    assert [p.name for p in (saved / "out").iterdir()] == ["evaluate.json"]
    teacher, (student,) = record["teacher"], record["models"]
    assert (teacher["kl"], teacher["agreement"], teacher["layers"], student["layers"]) == (0, 1, 5, 7)
    assert student["kl"] > 0
    assert student["agreement"] < 1
    assert student["loss"] != teacher["loss"] == student["teacher_loss"]
    assert len(student["correct"]) == record["rows"] == 5
    assert {"lost", "gained", "p"} == set(student["flips"])
    assert {"command", "commit", "threads", "dtype"} <= set(record)


def test_a_student_is_gone_before_the_next_is_loaded_and_the_teacher_stays(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So no more than two models need memory at a time, and each may have a device of its own."""
    load, place = command.load_model, command.on_device
    loaded, alive, placed = list[weakref.ref[Any]](), list[list[bool]](), list[str]()

    def watched(name: str, **how: Any) -> PreTrainedModel:
        alive.append([model() is not None for model in loaded])
        model = load(name, **how)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(command, "load_model", watched)
    monkeypatch.setattr(
        command, "on_device", lambda model, device: placed.append(device) or place(model, "cpu")
    )
    few = f"--data {saved}/test.jsonl --limit 2 --no-exact-match --device cuda:0,cuda:1".split()
    main([*few, "--teacher", f"{saved}/teacher", "--model", *([f"{saved}/student"] * 3)])
    assert alive == [[], [True], [True, False], [True, False, False]]
    assert placed == ["cuda:0", "cuda:1", "cuda:1", "cuda:1"]
    placed.clear()
    main([*few, "--model", f"{saved}/student", "--device", "cpu"])
    assert placed == ["cpu"]


def test_plain_text_is_judged_without_a_task(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (saved / "text.jsonl").write_text('{"text": "Ana has 3 eggs."}\n' * 3)
    own = f"--model {saved}/student --data {saved}/text.jsonl --text text --out {saved}/text.json".split()
    main(own)
    assert "perplexity" in capsys.readouterr().out
    main([*own, "--no-table"])
    assert capsys.readouterr().out == ""
    (figures,) = json.loads((saved / "text.json").read_text())["models"]
    assert "exact_match" not in figures
    assert figures["perplexity"] > 1


def test_a_row_without_a_final_answer_is_told_and_the_rest_is_judged(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A command of hours ends in this one, and the row may be any of thousands."""
    rows = [json.loads(line) for line in (saved / "test.jsonl").read_text().splitlines()]
    rows[2]["answer"] = "I do not know."
    (saved / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(f"--model {saved}/student --data {saved}/odd.jsonl --out {saved}/odd.json".split())
    assert f"1 of {len(rows)} rows have no answer that ends in" in (said := capsys.readouterr().err)
    assert f"the first is {saved}/odd.jsonl row 3" in said
    (figures,) = json.loads((saved / "odd.json").read_text())["models"]
    assert "exact_match" not in figures
    assert figures["perplexity"] > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data {0}/none.jsonl", "none.jsonl"),
        ("--data {0}/empty.jsonl", "is empty"),
        ("--data {0}/broken.jsonl", "is not JSON"),
        (
            "--data {0}/test.jsonl --prompt question --answer anwser",
            "lacks 'question' and 'anwser'",
        ),
        ("--data {0}/test.jsonl --teacher {0}/other", "vocabulary of"),
        ("--data {0}/test.jsonl --limit 0", "--limit.*above 0"),
        ("--data {0}/test.jsonl --mdel x", "Did you mean '--model'"),
        ("--data {0}/test.jsonl --device nowhere", "--device"),
        ("--data {0}/test.jsonl --teacher {0}/nothing", "nothing"),
    ],
)
def test_faults_are_named(saved: Path, tokenizer, arguments: str, message: str) -> None:
    (saved / "empty.jsonl").write_text("\n")
    (saved / "broken.jsonl").write_text('{"question": \n')
    tiny_model("llama", vocab_size=20).save_pretrained(saved / "other")
    tokenizer.save_pretrained(saved / "other")
    with pytest.raises(ConfigError, match=message):
        main(["--model", f"{saved}/student", *arguments.format(saved).split()])


def test_limit_takes_the_first_rows(saved: Path, rows) -> None:
    read = read_rows(f"{saved}/test.jsonl", 3)
    assert [row["question"] for row in read] == [row["question"] for row in rows[:3]]
