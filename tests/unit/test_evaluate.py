"""Judging: free generation, exact divergences, flips, and what the command writes."""

from __future__ import annotations

import json
import math
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from src import command
from src.data.arithmetic import build_tokenizer, problems
from src.data.documents import Columns
from src.data.judging import batches, by_length, judged, read_rows
from src.errors import ConfigError
from src.evaluate.generate import greedy, stop_tokens
from src.evaluate.text import held_out, of_teacher, row_sums
from src.evaluate.verb import exact_match, flips, main
from tests.marks import slow
from tests.tiny import tiny_ids, tiny_model

QA = Columns(prompt="question", answer="answer")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return list(problems("test", 12, seed=0))


@pytest.fixture(scope="module")
def models(tokenizer: PreTrainedTokenizerFast) -> tuple[PreTrainedModel, PreTrainedModel]:
    keys = {
        "vocab_size": len(tokenizer),
        "eos_token_id": 1,
        "bos_token_id": None,
        "max_position_embeddings": 256,
    }
    return tiny_model("llama", 0, **keys), tiny_model("llama", 1, num_hidden_layers=5, **keys)


# ---------------------------------------------------------------------- generation


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt2", "bloom", slow("qwen3_next")])
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


# ---------------------------------------------------------------------- held-out text


def test_held_out_is_the_mean_over_supervised_tokens(models, tokenizer, rows) -> None:
    student, teacher = models
    encoded = judged(tokenizer, rows, QA).rows
    kl, agree, loss, tokens = 0.0, 0, 0.0, 0
    for row in rows:  # one at a time, in the plainest way
        head, tail = tokenizer([row["question"] + "\n", row["answer"] + "<eos>"]).input_ids
        ids = torch.tensor([head + tail])
        with torch.no_grad():
            p, q = (m(ids).logits[0, len(head) - 1 : -1].double().softmax(-1) for m in (teacher, student))
        kl += float((p * (p / q).log()).sum())
        agree += int((p.argmax(-1) == q.argmax(-1)).sum())
        loss -= float(q[torch.arange(len(tail)), tail].log().sum())
        tokens += len(tail)
    for size, chunk in ((1, 1024), (5, 7)):
        figures = held_out(student, teacher, batches(encoded, size, 0), chunk)
        assert figures["tokens"] == tokens
        assert figures["agreement"] == agree / tokens
        assert figures["kl"] == pytest.approx(kl / tokens, rel=1e-5)
        assert figures["loss"] == pytest.approx(loss / tokens, rel=1e-5)
        assert figures["perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-4)


def test_a_model_judged_beside_itself_is_perfect(models, tokenizer, rows) -> None:
    teacher = models[1]
    text = batches(judged(tokenizer, rows, QA, "all").rows, 4, 0)
    figures = held_out(teacher, teacher, text)
    assert (figures["kl"], figures["agreement"]) == (0.0, 1.0)
    assert figures["loss"] == figures["teacher_loss"]


def test_a_teacher_judged_beside_a_model_is_as_judged_alone(models, tokenizer, rows) -> None:
    text = list(batches(judged(tokenizer, rows, QA, "all").rows, 4, 0))
    beside = row_sums(*models, text)
    alone = row_sums(models[1], None, text)
    assert torch.equal(of_teacher(beside), alone)
    assert not torch.equal(beside, alone)


def test_batches_come_by_length(tokenizer, rows) -> None:
    encoded = judged(tokenizer, rows, QA, "all").rows
    encoded += [replace(row, ids=row.ids[::-1]) for row in encoded]  # as long, and another
    read = list[list[int]]()
    for batch in batches(encoded, 5, 0):
        lengths = batch["attention_mask"].sum(-1).tolist()
        read += [row[:n] for row, n in zip(batch["input_ids"].tolist(), lengths, strict=True)]
    assert read == [encoded[place].ids for place in by_length(encoded)]


def test_rows_without_supervised_tokens_are_refused(models, tokenizer, rows) -> None:
    text = batches(judged(tokenizer, rows, QA, max_length=3).rows, 4, 0)
    with pytest.raises(ConfigError, match="max-length"):
        held_out(models[0], None, text)


# ---------------------------------------------------------------------- the task


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


def test_figures_have_intervals_that_hold_them(models, tokenizer, rows) -> None:
    teacher, student = models[:2]
    judgement = held_out(student, teacher, batches(judged(tokenizer, rows, QA, "all").rows, 4, 0))
    low, high = judgement["kl_interval"]
    assert low <= judgement["kl"] <= high
    assert low < high
    same = held_out(teacher, teacher, batches(judged(tokenizer, rows, QA, "all").rows, 4, 0))
    assert same["kl_interval"] == pytest.approx([0.0, 0.0], abs=1e-6)
    assert "kl_interval" not in held_out(student, None, batches(judged(tokenizer, rows, QA).rows, 4, 0))
