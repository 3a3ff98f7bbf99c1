"""A teacher and its student mean the same by an id; a head of another width changes nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from src.cache import CachedCorpus
from src.cache.reader import Cache
from src.cli import main, run
from src.data.arithmetic import build_tokenizer, problems
from src.data.batches import supervised
from src.errors import ConfigError
from src.losses.distill import Distillation
from src.losses.signals import topk_signal
from src.mask import Mask
from src.models.vocabulary import _difference, check_vocabulary
from src.teachers import CachedTeacher
from tests.data_tools import byte_tokenizer
from tests.tiny import tiny_model

K = 6
# ---------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def permuted(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A tokenizer of the same tokens and size, two of which have each other's ids."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab: dict[str, int] = rules["model"]["vocab"]
    a, b = (token for token, at in vocab.items() if at in (20, 21))
    vocab[a], vocab[b] = vocab[b], vocab[a]
    other = build_tokenizer()
    other._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(rules))
    return other


def saved(folder: Path, tokenizer: PreTrainedTokenizerFast, width: int, seed: int = 0) -> str:
    keys: dict[str, Any] = {"num_hidden_layers": 3, "max_position_embeddings": 512, "eos_token_id": 1}
    tiny_model("llama", seed, vocab_size=width, **keys).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def padded(model: str, folder: Path, tokenizer: PreTrainedTokenizerFast, rows: int) -> str:
    """A copy of a saved model with so many more rows, which are as likely as any."""
    wide: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model)
    wide.resize_token_embeddings(wide.config.vocab_size + rows, mean_resizing=False)
    with torch.no_grad():
        nn.init.normal_(wide.get_output_embeddings().weight[-rows:], std=0.3)
    wide.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """A model, its twin, the twin padded, one of other ids, one too small, one without a tokenizer; rows."""
    root = tmp_path_factory.mktemp("family")
    width = len(tokenizer)
    made = {name: saved(root / name, tokenizer, width) for name in ("model", "twin", "bare")}
    for file in (root / "bare").glob("tokenizer*"):
        file.unlink()
    made["padded"] = padded(made["twin"], root / "padded", tokenizer, 7)
    made["other"] = saved(root / "other", permuted(tokenizer), width)
    made["small"] = saved(root / "small", tokenizer, width - 3)
    made["rows"] = str(root / "rows.jsonl")
    rows = [json.dumps(row) + "\n" for row in problems("train", 12, 0)]
    (root / "rows.jsonl").write_text("".join(rows))
    return made


def fit(tmp_path: Path, family: dict[str, str], verb: str, model: str, *more: str) -> list[str]:
    """The command of two steps of a search or a recovery, or of a cache."""
    cached = any("CachedCorpus" in word for word in more)
    data = [] if cached else [f"--data.init_args.train={family['rows']}"]
    bare = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.callbacks=[]",
            "--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={tmp_path}",
            "--data.init_args.batch_size=4"]  # fmt: skip
    if verb == "predict":
        named = [f"--model.init_args.model={family[model]}", f"--model.init_args.out={tmp_path}/cache"]
        return ["predict", "--config", "configs/cache/topk.yaml", *named, *data, *bare, *more]
    bare += ["--trainer.max_steps=2", "--trainer.limit_val_batches=0"]
    if verb == "search":
        named = [f"--model.init_args.model={family[model]}", f"--data.init_args.validation={family['rows']}"]
        return ["fit", "--config", "configs/search/gumbel_topk.yaml", *named, *data, *bare, *more]
    Mask(model=family[model], num_layers=3, keep=(0, 2), method="test").save(tmp_path / "mask.json")
    named = [f"--model.init_args.mask={tmp_path}/mask.json"]
    return ["fit", "--config", "configs/recover/entropy_kd.yaml", *named, *data, *bare, *more]


def recover(tmp_path: Path, family: dict[str, str], student: str, *more: str) -> dict[str, Tensor]:
    """The weights after two steps of recovering a student without its middle layer."""
    done = run(fit(tmp_path, family, "recover", student, *more))
    return {name: weight.detach().clone() for name, weight in done.model.model.named_parameters()}


def taught(family: dict[str, str], teacher: str) -> list[str]:
    kind = "--model.init_args.teacher=src.teachers.LiveTeacher"
    return [kind, f"--model.init_args.teacher.init_args.model={family[teacher]}"]


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.allclose(a[name], b[name], atol=2e-6) for name in a)


def test_a_padded_teacher_trains_the_same_student(tmp_path: Path, family: dict[str, str]) -> None:
    padded, plain = (recover(tmp_path, family, "model", *taught(family, name)) for name in ("padded", "twin"))
    assert close(padded, plain)


def test_a_narrower_teacher_trains_a_padded_student(tmp_path: Path, family: dict[str, str]) -> None:
    trained = recover(tmp_path, family, "padded", *taught(family, "model"))
    assert len(trained["lm_head.weight"]) == len(build_tokenizer()) + 7
    assert all(weight.isfinite().all() for weight in trained.values())


def test_a_cache_of_a_padded_teacher_trains_the_same_student(tmp_path: Path, family: dict[str, str]) -> None:
    width = len(build_tokenizer())
    whole = [f"--model.init_args.k={width + 7}", "--model.init_args.precision=float32"]
    run(fit(tmp_path, family, "predict", "padded", *whole))
    cached = Cache(f"{tmp_path}/cache")
    assert cached.about.vocabulary == width + 7
    corpus = CachedCorpus(family["model"], train=cached.path, batch_size=4)
    teacher = CachedTeacher(any_teacher=True)
    head, distillation = SimpleNamespace(vocabulary=width), Distillation(k=K)
    module: Any = SimpleNamespace(head=head, distillation=distillation, data=corpus)
    teacher.setup(module)
    model = AutoModelForCausalLM.from_pretrained(family["twin"])
    for batch in corpus.train_dataloader():
        index = supervised(batch["labels"])
        found = teacher.signal(batch, index)
        with torch.no_grad():
            logits_BTV = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        wanted = topk_signal(logits_BTV.flatten(0, 1)[index], K)
        assert torch.equal(found.ids, wanted.ids)
        assert torch.allclose(found.log_probs, wanted.log_probs, atol=1e-4)
        assert torch.allclose(found.entropy, wanted.entropy, atol=1e-4)
        assert torch.allclose(found.log_rest, wanted.log_rest, atol=1e-4)
    from_cache = ["--data=src.cache.CachedCorpus", f"--data.init_args.train={cached.path}",
                  "--model.init_args.teacher=src.teachers.CachedTeacher",
                  "--model.init_args.teacher.init_args.any_teacher=true"]  # fmt: skip
    trained = recover(tmp_path, family, "model", *from_cache)
    assert all(weight.isfinite().all() for weight in trained.values())


def figures(tmp_path: Path, family: dict[str, str], teacher: str, model: str) -> dict[str, Any]:
    out = tmp_path / f"{teacher}-{model}.json"
    main(["evaluate", "--teacher", family[teacher], "--model", family[model], "--data", family["rows"],
          "--no-exact-match", "--out", str(out)])  # fmt: skip
    (found,) = json.loads(out.read_text())["models"]
    return dict(found)


def test_evaluate_compares_over_the_students_vocabulary(tmp_path: Path, family: dict[str, str]) -> None:
    wide, same = figures(tmp_path, family, "padded", "model"), figures(tmp_path, family, "twin", "model")
    assert wide["kl"] == pytest.approx(0, abs=1e-6)
    assert wide["loss"] == pytest.approx(same["loss"])
    assert wide["agreement"] == 1
    assert wide["teacher_loss"] > same["teacher_loss"]  # its own, with mass on rows of padding
    narrow = figures(tmp_path, family, "model", "padded")
    assert 0 < narrow["kl"] == pytest.approx(narrow["loss"] - same["loss"], rel=1e-4)


OTHER = r"has another tokenizer than the data, .*: token '.+' of id 20 is id 21 there \(and 1 more\)"
SMALL = r"tokens go up to \d+, but the vocabulary of '.+' has \d+\. .*same tokenizer"


@pytest.mark.parametrize(("teacher", "message"), [("other", OTHER), ("small", SMALL)])
@pytest.mark.parametrize("verb", ["recover", "search", "evaluate", "evaluate beside"])
def test_a_teacher_of_other_tokens_is_refused_by_every_verb(
    tmp_path: Path, family: dict[str, str], verb: str, teacher: str, message: str
) -> None:
    of_rows = ["--data", family["rows"], "--no-exact-match"]
    command = {
        "evaluate": ["evaluate", "--teacher", family["model"], "--model", family[teacher], *of_rows],
        "evaluate beside": ["evaluate", "--model", family["model"], family[teacher], *of_rows],
    }
    asked = command.get(verb) or fit(tmp_path, family, verb, "model", *taught(family, teacher))
    with pytest.raises(ConfigError, match=message) as error:
        run(asked)
    assert family[teacher] in str(error.value)


@pytest.mark.parametrize("verb", ["search", "recover", "predict"])
def test_data_of_another_tokenizer_than_the_models_are_refused(
    tmp_path: Path, family: dict[str, str], verb: str
) -> None:
    asked = fit(tmp_path, family, verb, "model", f"--data.init_args.tokenizer={family['other']}")
    with pytest.raises(ConfigError, match=r"data\.tokenizer: '.*model' has another tokenizer than the data"):
        run(asked)
    assert not list(tmp_path.rglob("*.parquet"))


@pytest.mark.parametrize("role", ["additional", "pad", "unk", "template"])
def test_a_special_token_beyond_the_vocabulary_is_no_fault_unless_rows_hold_it(
    tokenizer: PreTrainedTokenizerFast, role: str
) -> None:
    """As the token for images in the tokenizer of Gemma 3, which its text models share and do not hold."""
    highest = max(tokenizer.get_vocab().values())
    model, wider = tiny_model("llama", vocab_size=highest + 1), build_tokenizer()
    named = {f"{role}_token": "<new>"} if role in ("pad", "unk") else {"additional_special_tokens": ["<new>"]}
    assert wider.add_special_tokens(named) == 1
    wider.name_or_path = "own"
    wider.chat_template = "{{ '<new>' }}" if role == "template" else None
    if role == "additional":
        check_vocabulary(wider, model, "own")
        return
    with pytest.raises(ConfigError, match=f"tokens go up to {highest + 1}, but"):
        check_vocabulary(wider, model, "own")


def test_a_teacher_without_a_tokenizer_is_told(tmp_path: Path, family: dict[str, str]) -> None:
    with pytest.warns(UserWarning, match=r"teacher\.model: '.*bare' has no tokenizer; its ids are taken"):
        recover(tmp_path, family, "model", *taught(family, "bare"))


def test_more_tokens_and_a_padding_token_do_not_part_tokenizers(tokenizer: PreTrainedTokenizerFast) -> None:
    """A teacher may know tokens that the student's text never holds."""
    teacher, student = build_tokenizer(), build_tokenizer()
    teacher.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    assert _difference(tokenizer, teacher) is None
    assert "is none there" in str(_difference(teacher, tokenizer))
    student.add_special_tokens({"pad_token": "<filler>"})
    assert _difference(student, tokenizer) is None


def test_tokenizers_of_the_same_tokens_that_divide_text_in_another_way_are_parted() -> None:
    other = byte_tokenizer()
    rules = json.loads(other.backend_tokenizer.to_str())
    rules["pre_tokenizer"]["add_prefix_space"] = True
    other._tokenizer = type(other.backend_tokenizer).from_str(json.dumps(rules))
    assert _difference(byte_tokenizer(), byte_tokenizer()) is None
    assert "divides text in another way" in str(_difference(byte_tokenizer(), other))
