"""What a model writes: its own likeliest tokens, the same after any interruption, read again as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from src.data import Corpus
from src.data.columns import Columns
from src.data.formats import WHERE
from src.errors import ConfigError
from src.evaluate.generate import greedy, stop_tokens
from src.generate import verb
from src.generate.prompts import Prompts
from src.generate.verb import main

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def command(teacher: str, prompts: str | Path, out: Path, *more: str) -> list[str]:
    short = ("--max-new-tokens", "6", "--batch-size", "3", "--device", "cpu")
    return ["--model", teacher, "--prompts", str(prompts), "--out", str(out), "--limit", "8", *short, *more]


@pytest.fixture
def chatty(teacher_dir: str, tmp_path: Path) -> str:
    """The tiny model with a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    tokenizer.chat_template = CHAT
    AutoModelForCausalLM.from_pretrained(teacher_dir).save_pretrained(tmp_path / "chatty")
    tokenizer.save_pretrained(tmp_path / "chatty")
    return str(tmp_path / "chatty")


def test_without_temperature_it_is_the_likeliest_continuation(
    teacher_dir: str, corpus_file: str, tmp_path: Path
) -> None:
    main(command(teacher_dir, corpus_file, tmp_path / "own.jsonl"))
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    model = AutoModelForCausalLM.from_pretrained(teacher_dir).eval()
    asked = [row["question"] for row in rows_of(Path(corpus_file))[:8]]
    alone = [
        greedy(model, [tokenizer(f"{text}\n").input_ids], 6, stop_tokens(model, tokenizer))[0]
        for text in asked
    ]
    wanted = [
        {"prompt": text, "completion": tokenizer.decode(new, skip_special_tokens=True)}
        for text, new in zip(asked, alone, strict=True)
    ]
    assert rows_of(tmp_path / "own.jsonl") == wanted
    record = json.loads((tmp_path / "own.jsonl.record.json").read_text())
    assert (record["rows"], record["tokens"]) == (8, sum(map(len, alone)))
    assert record["unfinished"] == sum(len(new) == 6 for new in alone)
    assert not (tmp_path / "own.jsonl.parts").exists()


def test_what_was_interrupted_goes_on_and_is_the_same(
    teacher_dir: str, corpus_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches that are whole stay; those behind draw what they would have drawn."""
    hot = ("--temperature", "1.5", "--seed", "4")
    main(command(teacher_dir, corpus_file, tmp_path / "whole.jsonl", *hot))
    calls, write = list[int](), verb.written

    def ends(*args: Any) -> Any:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(args[2]))
        return write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(verb, "written", ends)
        with pytest.raises(KeyboardInterrupt):
            main(command(teacher_dir, corpus_file, tmp_path / "torn.jsonl", *hot))
    assert calls == [3, 3]
    assert not (tmp_path / "torn.jsonl").exists()
    with pytest.raises(ConfigError, match="other settings \\(options\\)"):
        main(command(teacher_dir, corpus_file, tmp_path / "torn.jsonl"))
    stored = sorted((tmp_path / "torn.jsonl.parts").glob("batch-*.json"))
    for part in stored:
        part.write_text(json.dumps(json.loads(part.read_text()) | {"seconds": 1000}))
    with monkeypatch.context() as patch:
        patch.setattr(verb, "written", lambda *args: calls.append(len(args[2])) or write(*args))
        main(command(teacher_dir, corpus_file, tmp_path / "torn.jsonl", *hot))
    assert calls == [3, 3, 2], "only the last batch was left"
    seconds = json.loads((tmp_path / "torn.jsonl.record.json").read_text())["seconds"]
    assert 2000 < seconds < 2060, "of both processes"
    assert (tmp_path / "torn.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    main(command(teacher_dir, corpus_file, tmp_path / "other.jsonl", "--temperature", "1.5", "--seed", "5"))
    assert (tmp_path / "other.jsonl").read_text() != (tmp_path / "whole.jsonl").read_text()


def test_the_coldest_draw_is_the_likeliest_token_and_a_colder_one_is_refused(
    teacher_dir: str, corpus_file: str, tmp_path: Path
) -> None:
    """Logits divided by 1e-300 would be infinite, and their softmax NaN."""
    for name, heat in (("likeliest", "0"), ("coldest", str(verb.COLDEST))):
        main(command(teacher_dir, corpus_file, tmp_path / name, "--temperature", heat))
    assert (tmp_path / "likeliest").read_text() == (tmp_path / "coldest").read_text()
    for heat in ("1e-300", "0.0009", "-1"):
        with pytest.raises(ConfigError, match=r"accepted: a number from 0\.001 to 100, or 0"):
            main(command(teacher_dir, corpus_file, tmp_path / "x", "--temperature", heat))


def test_a_file_that_is_there_is_kept_or_replaced_on_request(
    teacher_dir: str, corpus_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "own.jsonl"
    out.write_text("mine\n")
    with pytest.raises(ConfigError, match="--force"):
        main(command(teacher_dir, corpus_file, out))
    assert out.read_text() == "mine\n"
    main(command(teacher_dir, corpus_file, out, "--force"))
    main(command(teacher_dir, corpus_file, out))
    assert "written already" in capsys.readouterr().out


def test_parts_hold_every_prompt_once(teacher_dir: str, corpus_file: str, tmp_path: Path) -> None:
    """Part K of N is every N-th row from row K on, of the rows that --limit leaves."""
    main(command(teacher_dir, corpus_file, tmp_path / "whole.jsonl"))
    whole = rows_of(tmp_path / "whole.jsonl")
    for part in range(3):
        main(command(teacher_dir, corpus_file, tmp_path / f"{part}.jsonl", "--part", f"{part}/3"))
        assert rows_of(tmp_path / f"{part}.jsonl") == whole[part::3]
    main(command(teacher_dir, corpus_file, tmp_path / "alone.jsonl", "--part", "0/1"))
    assert rows_of(tmp_path / "alone.jsonl") == whole
    with pytest.raises(ConfigError, match="has 8 rows, none for part 8/9"):
        main(command(teacher_dir, corpus_file, tmp_path / "none.jsonl", "--part", "8/9"))


@pytest.mark.parametrize("part", ["3/3", "-1/3", "1", "1/0", "a/b", "/", "1/2/3"])
def test_what_is_no_part_is_refused(part: str, teacher_dir: str, corpus_file: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--part: .* accepted: K/N with K from 0 to N - 1"):
        main(command(teacher_dir, corpus_file, tmp_path / "own.jsonl", f"--part={part}"))
    assert not list(tmp_path.iterdir())


def test_parts_draw_by_noise_of_their_own(
    teacher_dir: str, corpus_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = list[int]()
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    for part in range(3):
        main(
            command(
                teacher_dir, corpus_file, tmp_path / f"{part}.jsonl", "--part", f"{part}/3", "--seed", "2"
            )
        )
    assert len(seeds) == len(set(seeds)) == 3


def test_rows_that_the_model_did_not_end_can_be_left_out(
    teacher_dir: str, corpus_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thought without its end is no answer; a template may render it as an answer without a thought."""
    write, said = verb.written, list[verb.Written]()
    monkeypatch.setattr(verb, "stop_tokens", lambda *_: frozenset(range(30)))  # some come, some do not
    monkeypatch.setattr(verb, "written", lambda *args: said.extend(own := write(*args)) or own)
    main(command(teacher_dir, corpus_file, tmp_path / "own.jsonl", "--finished"))
    ended = [each for each in said if each["finished"]]
    assert 0 < len(ended) < len(said) == 8
    found = rows_of(tmp_path / "own.jsonl")
    assert sorted(map(str, found)) == sorted(str(each["row"]) for each in ended)
    record = json.loads((tmp_path / "own.jsonl.record.json").read_text())
    assert (record["rows"], record["unfinished"]) == (len(ended), 8 - len(ended))
    assert record["tokens"] == sum(each["tokens"] for each in ended)
    monkeypatch.setattr(verb, "stop_tokens", lambda *_: frozenset([10**6]))
    with pytest.raises(ConfigError, match="--finished: none of the 8 rows ended within 6 tokens"):
        main(command(teacher_dir, corpus_file, tmp_path / "none.jsonl", "--finished"))
    assert not (tmp_path / "none.jsonl").exists()


def test_chats_texts_and_questions_become_rows_that_are_read_as_they_are(chatty: str, tmp_path: Path) -> None:
    """A chat is answered where its last answer began; a text goes on behind its first tokens."""
    turns = [("user", "1 + 1"), ("assistant", "2"), ("user", "2 + 3"), ("assistant", "5")]
    chat = {"messages": [{"role": role, "content": said} for role, said in turns]}
    given = [chat, {"question": "4 + 4", "answer": "8"}, {"text": "1 + 2 = 3 and 2 + 2 = 4"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    main(command(chatty, tmp_path / "in.jsonl", tmp_path / "own.jsonl", "--start", "3"))
    answered, asked, text = rows_of(tmp_path / "own.jsonl")
    assert answered["messages"][:3] == chat["messages"][:3]
    assert [turn["role"] for turn in asked["messages"]] == ["user", "assistant"]
    assert asked["messages"][0]["content"] == "4 + 4"
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    assert text["text"].startswith(tokenizer.decode(tokenizer(given[2]["text"]).input_ids[:3]))
    corpus = Corpus(tokenizer=chatty, train=str(tmp_path / "own.jsonl"), batch_size=3, max_length=99)
    read = list(corpus.predict_dataloader())
    assert sum(len(batch["input_ids"]) for batch in read) == 3
    assert all(torch.any(batch["labels"] != -100) for batch in read)


def test_whatever_conditions_an_answer_reaches_the_model(chatty: str, tmp_path: Path) -> None:
    """Columns of input and system, tools, and a last turn that nobody has answered yet."""
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    tokenizer.chat_template = "{% for t in tools or [] %}[{{ t.name }}]{% endfor %}" + CHAT
    said = (("user", "1"), ("assistant", "2"), ("user", "3"))
    turns, tools = [{"role": role, "content": words} for role, words in said], [{"name": "add"}]
    rows = [
        {"messages": turns, "tools": tools, "system": "be brief"},
        {"instruction": "sum", "input": "4 + 4", "output": "8"},
    ]
    prompts = Prompts(tokenizer, Columns(), 3)([{WHERE: "row", **row} for row in rows])
    called, asked = (prompt.row(tokenizer("5").input_ids) for prompt in prompts)
    system = {"role": "system", "content": "be brief"}
    assert called == {"messages": [system, *turns, {"role": "assistant", "content": "5"}], "tools": tools}
    assert asked["messages"][0] == {"role": "user", "content": "sum\n4 + 4"}
    texts = ["[add]<system>be brief<user>1<assistant>2<user>3<assistant>", "<user>sum\n4 + 4<assistant>"]
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    assert [prompt.ids for prompt in prompts] == ids


def test_what_a_template_refuses_is_told_by_its_row(chatty: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ConfigError, match=r"row 7: the chat template refuses this chat: .*must alternate"):
        Prompts(tokenizer, Columns(), 3)([{WHERE: "row 7", "question": "1", "answer": "2"}])


def test_what_cannot_be_answered_is_refused_by_its_row(chatty: str, tmp_path: Path) -> None:
    alone = {"messages": [{"role": "assistant", "content": "hello"}]}
    (tmp_path / "in.jsonl").write_text(json.dumps(alone) + "\n")
    with pytest.raises(ConfigError, match=r"in\.jsonl row 1: the chat has no turn before its last answer"):
        main(command(chatty, tmp_path / "in.jsonl", tmp_path / "own.jsonl"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chatty", "in.jsonl"]


def test_a_model_asks_itself(chatty: str, tmp_path: Path) -> None:
    """It goes on where a user's words begin: other words each time, the same in each run."""
    out, answers = tmp_path / "questions.jsonl", tmp_path / "own.jsonl"
    ask = ["--model", chatty, "--questions", "7", "--temperature", "0.7", "--out", str(out), "--force"]
    short = ["--max-new-tokens", "6", "--batch-size", "3", "--device", "cpu"]
    main([*ask, *short])
    rows = rows_of(out)
    questions = [row["messages"] for row in rows]
    assert all(len(turns) == 1 and turns[0]["role"] == "user" and turns[0]["content"] for turns in questions)
    assert len({turns[0]["content"] for turns in questions}) > 1
    main([*ask, *short])
    assert rows_of(out) == rows
    main(command(chatty, out, answers))
    assert [row["messages"][:1] for row in rows_of(answers)] == questions
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    begun = Prompts(tokenizer, Columns(), 3).questions(2)
    assert [prompt.ids for prompt in begun] == [tokenizer("<user>", add_special_tokens=False).input_ids] * 2


def test_questions_that_cannot_be_asked_are_refused(chatty: str, teacher_dir: str, tmp_path: Path) -> None:
    ask = ["--questions", "7", "--out", str(tmp_path / "own.jsonl"), "--device", "cpu"]
    for model, more, told in (
        (chatty, [], "all would be the same at --temperature 0"),
        (chatty, ["--temperature", "1", "--limit", "3", "--start", "16"], "leave out --limit, --start"),
        (chatty, ["--temperature", "1", "--ignore", "a", "--text", "b"], "leave out --text, --ignore"),
        (teacher_dir, ["--temperature", "1"], "has no chat template"),
        (chatty, ["--temperature", "1", "--part", "8/9"], "--questions: 7 rows, none for part 8/9"),
    ):
        with pytest.raises(ConfigError, match=told):
            main(["--model", model, *ask, *more])
    assert not list(tmp_path.glob("own*"))
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    tokenizer.chat_template = "{{ raise_exception('no') if not messages[0].content.isascii() }}"
    with pytest.raises(ConfigError, match="--questions: a question: the chat template refuses"):
        Prompts(tokenizer, Columns(), 3).questions(1)


def test_a_question_ends_where_the_template_ends_a_turn(chatty: str) -> None:
    """What ends it is no stop token of many models, which go on and answer."""
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    tokenizer.chat_template = "{% for m in messages %}<user>{{ m.content }}?{% endfor %}"
    (asks,) = Prompts(tokenizer, Columns(), 3).questions(1)
    for said, asked in (("1 + 2? 3", "1 + 2"), ("1 + 2", "1 + 2"), ("? 3", "")):
        new = tokenizer(said, add_special_tokens=False).input_ids
        assert asks.row(new) == {"messages": [{"role": "user", "content": asked}]}
