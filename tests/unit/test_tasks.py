"""Public tasks: scores, ratios and flips against the same computed by hand, and the faults that are named."""

from __future__ import annotations

import importlib.util
import json
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from src import command
from src.errors import ConfigError
from src.evaluate.harness import ask, load_tasks
from src.evaluate.tasks import scores
from src.evaluate.verb import main
from tests.tiny import tiny_model

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs the extra: pip install -e '.[tasks]'"
)
DOCS: list[dict[str, Any]] = [
    {"query": "Ana has 3 eggs and buys 4.", "choices": ["7 eggs", "12 eggs in all", "1 egg"], "gold": 0},
    {"query": "Ben has 9 pens and loses 5.", "choices": ["14 pens", "4 pens", "45 pens and 2"], "gold": 1},
    {"query": "Each box holds 6. There are 2.", "choices": ["8", "3", "12 in the boxes"], "gold": 2},
    {"query": "Half of 10 cards are red.", "choices": ["5 red cards", "20", "10 cards"], "gold": 0},
    {"query": "Eva reads 8 pages a day.", "choices": ["8 days", "16 in 2 days", "2"], "gold": 1},
    {"query": "Tom has no coins.", "choices": ["1 coin", "10 coins for Tom", "0 coins"], "gold": 2},
]
YAML = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: docs.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: query
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(scope="module")
def models(tokenizer: PreTrainedTokenizerFast) -> tuple[PreTrainedModel, PreTrainedModel]:
    keys = {"vocab_size": len(tokenizer), "eos_token_id": 1, "bos_token_id": None}
    keys["max_position_embeddings"] = 256
    return tiny_model("llama", 3, **keys), tiny_model("llama", 4, num_hidden_layers=5, **keys)


@pytest.fixture
def folder(tmp_path: Path, models, tokenizer, monkeypatch) -> Path:
    """Two saved models, a folder of task YAMLs, and their data beside it."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, model in zip(("student", "teacher"), models, strict=True):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "yaml").mkdir()
    (tmp_path / "yaml" / "tiny.yaml").write_text(YAML)
    lines(tmp_path / "docs.jsonl", DOCS)
    return tmp_path


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def log_likelihood(model: PreTrainedModel, tokenizer: Any, context: str, text: str) -> float:
    """Log-probability of ``text`` after ``context``: one row, no padding, the plainest way."""
    ids, start = tokenizer.encode(context + text), len(tokenizer.encode(context))
    with torch.no_grad():
        log_TV = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(log_TV[at - 1, ids[at]]) for at in range(start, len(ids)))


def by_hand(model: PreTrainedModel, tokenizer: Any, normed: bool) -> list[bool]:
    """Which documents the model gets right: the likeliest choice, per character if ``normed``."""
    right = []
    for doc in DOCS:
        given = [
            log_likelihood(model, tokenizer, doc["query"], f" {choice}") / (len(choice) if normed else 1)
            for choice in doc["choices"]
        ]
        right.append(given.index(max(given)) == doc["gold"])
    return right


def evaluate(folder: Path, teacher: str, *more: str) -> dict[str, Any]:
    argv = f"--tasks tiny_choice --include-path {folder}/yaml --data-dir {folder} --out {folder}/out.json"
    main([*argv.split(), "--teacher", f"{folder}/{teacher}", "--model", f"{folder}/student", *more])
    return json.loads((folder / "out.json").read_text())


@needs_harness
def test_scores_and_flips_are_those_computed_by_hand(folder: Path, models, tokenizer) -> None:
    record = evaluate(folder, "teacher")
    (student,), teacher = record["models"], record["teacher"]
    moved = 0
    for metric, normed in (("acc", False), ("acc_norm", True)):
        own, other = (by_hand(model, tokenizer, normed) for model in models)
        for judged, right in ((student, own), (teacher, other)):
            found = judged["tasks"]["tiny_choice"][metric]
            assert found["correct"] == "".join("01"[ok] for ok in right)
            assert found["score"] == pytest.approx(sum(right) / 6)
            p = sum(right) / 6  # the error of a mean of 0 and 1, with n - 1
            assert found["stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 5))
        lost = sum(b and not a for a, b in zip(own, other, strict=True))
        gained = sum(a and not b for a, b in zip(own, other, strict=True))
        n, less = lost + gained, min(lost, gained)
        p = min(1.0, 2 * sum(math.comb(n, k) * 0.5**n for k in range(less + 1)))
        found = student["tasks"]["tiny_choice"][metric]
        assert found["flips"] == {"lost": lost, "gained": gained, "p": pytest.approx(p)}
        assert found["ratio"] == pytest.approx(sum(own) / sum(other))
        moved += n
    assert moved > 0, "models that agree everywhere test nothing"
    assert record["tasks"]["tiny_choice"] | {"data": 0, "version": 0} == {
        "shots": 0, "documents": 6, "less_is_better": [], "data": 0, "version": 0,
    }  # fmt: skip
    assert {"command", "commit", "lm_eval"} <= set(record)


@needs_harness
def test_a_model_beside_itself_has_ratio_one_and_no_flips(folder: Path, capsys) -> None:
    record = evaluate(folder, "student", "--limit", "4", "--batch-size", "2", "--num-fewshot", "1")
    assert (record["tasks"]["tiny_choice"]["shots"], record["tasks"]["tiny_choice"]["documents"]) == (1, 4)
    for metric, own in record["models"][0]["tasks"]["tiny_choice"].items():
        other = record["teacher"]["tasks"]["tiny_choice"][metric]
        assert own["flips"] == {"lost": 0, "gained": 0, "p": 1.0}
        assert {key: own[key] for key in other} == other
        assert own.get("ratio", 1.0) == 1.0
        assert ("ratio" in own) == (other["score"] > 0)
    table = capsys.readouterr().out
    assert "tiny_choice (1-shot, 4)" in table
    assert "0 / 0 (p 1)" in table


@needs_harness
def test_the_shipped_tasks_ask_what_the_harness_asks(folder: Path, models, tokenizer) -> None:
    choice = {"query": "Question: How many eggs?\n", "choices": ["3 eggs", "4"], "gold": 1}
    words = [
        {"context": "Ana has 3", "continuation": "eggs"},
        {"context": "Ben buys 4", "continuation": "pens"},
    ]
    lines(folder / "piqa.jsonl", [choice] * 3)
    lines(folder / "arc_easy.jsonl", [choice | {"query": "Question: How many eggs?"}] * 2)
    lines(folder / "lambada_openai.jsonl", words)
    names = ["piqa_local", "arc_easy_local", "lambada_openai_local"]
    found = ask(models[0], tokenizer, load_tasks(names, "configs/tasks", str(folder)))
    for name, documents in (("piqa_local", 3), ("arc_easy_local", 2)):
        assert len(found["samples"][name]) == documents
        prompt = "Question: How many eggs?\nAnswer:"
        assert found["samples"][name][0]["arguments"] == [(prompt, " 3 eggs"), (prompt, " 4")]
    judged = scores(found)
    assert {name: set(judged[name]) for name in names} == {
        "piqa_local": {"acc", "acc_norm"},
        "arc_easy_local": {"acc", "acc_norm"},
        "lambada_openai_local": {"acc", "perplexity"},
    }
    total = sum(log_likelihood(models[0], tokenizer, w["context"], f" {w['continuation']}") for w in words)
    perplexity = judged["lambada_openai_local"]["perplexity"]
    assert perplexity["score"] == pytest.approx(math.exp(-total / 2), rel=1e-4)
    assert "correct" not in perplexity
    assert len(judged["lambada_openai_local"]["acc"]["correct"]) == 2


MATHS = [  # reference, what the model writes, whether that is right
    (r"\frac{1}{2}", r"First \boxed{3}, no: \boxed{\dfrac{1}{2}}", True),
    (r"\frac12", r"\boxed{ \tfrac{1}{2} }.", True),
    ("2", r"\boxed{2}, or rather \boxed{3}", False),
    ("10", "The answer is 10.", False),
    ("10", r"\boxed{100}", False),
    (r"\text{Evelyn}", r"\boxed{Evelyn}", True),
    ("p - q", r"\boxed{p-q}", True),
    (r"90^\circ", r"\boxed{90}", True),
    (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3,\frac{\pi}{2})}", True),
    (r"x^{2}", r"\boxed{x^2}", True),
    (r"\sqrt{\frac{1}{2^{10}}}", r"\boxed{\sqrt{\frac{1}{2^{10}}}}", True),
    ("32,348", r"\boxed{\$32{,}348}", False),  # compared as text: what is written otherwise is wrong
    ("32348", r"\boxed{\$32,\!348}", True),
    ("(1,2)", r"\boxed{(12)}", False),
    ("1, 234", r"\boxed{1234}", False),
    (r"\leftarrow", r"\boxed{arrow}", False),
    ("4", r"never closed \boxed{4" + " x" * 20_000, False),
]


@needs_harness
def test_the_last_box_of_a_chain_of_thought_is_the_answer(
    folder: Path, models, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.huggingface import HFLM

    lines(folder / "math_500.jsonl", [{"problem": str(n), "answer": a} for n, (a, _, _) in enumerate(MATHS)])
    asked = list[Any]()

    def writes(_: Any, requests: list[Any], **__: Any) -> list[str]:
        asked.extend(request.args for request in requests)
        return [MATHS[request.doc_id][1] for request in requests]

    monkeypatch.setattr(HFLM, "generate_until", writes)
    tasks = load_tasks(["math_500_local"], "configs/tasks", str(folder))
    found = scores(ask(models[0], tokenizer, tasks))["math_500_local"]["exact_match,boxed"]
    assert dict(zip((a for a, _, _ in MATHS), found["correct"], strict=True)) == {a: ok for a, _, ok in MATHS}
    assert found["correct"] == [ok for _, _, ok in MATHS]
    prompt, how = asked[0]
    assert prompt == "0\n\nPut the final answer in \\boxed{}."
    assert (how["until"], how["max_gen_toks"], how["do_sample"]) == ([], 8192, True)


@needs_harness
def test_a_chat_model_is_asked_by_its_template_and_stops_where_it_is_told(
    folder: Path, models, tokenizer
) -> None:
    lines(folder / "math_500.jsonl", [{"problem": f"Half of {n}?", "answer": "1"} for n in (2, 4)])

    def asked(**how: Any) -> list[dict[str, Any]]:
        tasks = load_tasks(["math_500_local"], "configs/tasks", str(folder))
        return ask(models[0], tokenizer, tasks, **how)["samples"]["math_500_local"]

    with pytest.raises(ConfigError, match=r"--chat: .* no chat template"):
        asked(chat=True)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
    try:
        chats = asked(chat=True, new_tokens=3)
    finally:
        tokenizer.chat_template = None
    plain = asked(new_tokens=5)
    for chat, text in zip(chats, plain, strict=True):
        question = text["arguments"][0][0]
        assert chat["arguments"][0][0] == f"<user>{question}<answer>"
    for samples, most in ((chats, 3), (plain, 5)):
        lengths = [len(tokenizer(sample["resps"][0][0]).input_ids) for sample in samples]
        assert 0 < max(lengths) <= most
    with pytest.raises(ConfigError, match=r"refuses: .*maximum sequence length"):
        asked(new_tokens=10_000)


@needs_harness
def test_two_models_are_never_held_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, loaded = command.load_model, list[weakref.ref[Any]]()

    def watched(name: str, **how: Any) -> PreTrainedModel:
        assert not [model for model in loaded if model() is not None], "the model before is still there"
        model = load(name, **how)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(command, "load_model", watched)
    evaluate(folder, "teacher", "--limit", "1", "--device", "cpu")
    assert len(loaded) == 2


@needs_harness
def test_faults_of_tasks_are_named(folder: Path, models, tokenizer, monkeypatch) -> None:
    import datasets
    import lm_eval.tasks

    class Local(lm_eval.tasks.TaskManager):
        """Without the harness's own 14,000 files, which take ten seconds to read."""

        def __init__(self, include_path: str | None = None, include_defaults: bool = True) -> None:
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Local)
    tasks = str(folder / "yaml")
    with pytest.raises(ConfigError, match=r"unknown 'tiny_choise' \(near: tiny_choice\)"):
        load_tasks(["tiny_choise"], tasks, str(folder))
    with pytest.raises(ConfigError, match="names no task"):
        load_tasks([], tasks, str(folder))
    with pytest.raises(ConfigError, match="--include-path: there is no directory"):
        load_tasks(["tiny_choice"], f"{folder}/none", str(folder))
    with pytest.raises(ConfigError, match=r"'tiny_choice' cannot be loaded: .*docs\.jsonl.*--data-dir"):
        load_tasks(["tiny_choice"], tasks, tasks)
    few = load_tasks(["tiny_choice"], tasks, str(folder))
    with pytest.raises(ConfigError, match="the lm-evaluation-harness refuses: "):
        ask(models[0], tokenizer, few, shots=50)

    def unreachable(**_: Any) -> None:
        raise ConnectionError("Couldn't reach 'someone/tiny' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        ConfigError, match=r"'tiny_choice' cannot be loaded: .*Hub.*--include-path configs/tasks"
    ):
        load_tasks(["tiny_choice"], tasks, str(folder))
