"""A cache is of the model that is recovered, unless another teacher is asked for by name."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer

from src.cache import Cache, CachedCorpus, CacheTeacher, Manifest
from src.cache.origin import check_origin
from src.errors import ConfigError
from src.mask import Mask
from src.models.fingerprint import weights_fingerprint
from src.models.loading import load_model
from src.recover import Recovery
from src.teachers import CachedTeacher
from tests.cached import BARE, Workspace, small, workspace


@pytest.fixture(scope="module")
def ws(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return workspace(tmp_path_factory.mktemp("ws"), rows=16)


@pytest.fixture(scope="module")
def cache(ws: Workspace) -> str:
    return ws.write("cache")


@pytest.fixture(scope="module")
def tuned(ws: Workspace) -> str:
    """A child of the teacher: the same config and tokenizer, other weights."""
    path = ws.root / "tuned"
    shutil.copytree(ws.model, path)
    small("llama", seed=1).save_pretrained(path)
    return str(path)


def noted(cache: str, out: Path, **changes: str | None) -> str:
    """A copy of a cache whose manifest says something else of the teacher."""
    shutil.copytree(cache, out)
    manifest = Manifest.load(cache)
    assert manifest is not None
    replace(manifest, **changes).save(str(out))  # type: ignore[arg-type]
    return str(out)


def recover(parent: str, cache: str, tmp_path: Path, teacher: CachedTeacher, validation: str = "") -> int:
    """Recover ``parent``, less one layer, for one step; the steps that were taken."""
    mask = tmp_path / "mask.json"
    Mask(model=parent, num_layers=2, keep=(0,), method="test").save(mask)
    data = CachedCorpus(tokenizer=parent, train=cache, validation=validation or None, batch_size=4)
    trainer = Trainer(**BARE, max_steps=1, limit_val_batches=0)
    trainer.fit(Recovery(str(mask), teacher=teacher), datamodule=data)
    return trainer.global_step


def test_another_teacher_of_the_same_tokenizer_is_refused_unless_it_is_asked_for(
    ws: Workspace, cache: str, tuned: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"cache: teacher: .*any_teacher") as refusal:
        recover(tuned, cache, tmp_path, CachedTeacher())
    assert f"'{ws.model}'" in str(refusal.value)
    assert f"'{tuned}'" in str(refusal.value)
    assert recover(tuned, cache, tmp_path, CachedTeacher(any_teacher=True)) == 1


def test_the_same_weights_are_accepted_from_another_place(ws: Workspace, cache: str, tmp_path: Path) -> None:
    shutil.copytree(ws.model, tmp_path / "moved")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="cache: ")
        assert recover(str(tmp_path / "moved"), cache, tmp_path, CachedTeacher()) == 1


def test_the_cache_of_validation_is_compared_too(
    ws: Workspace, cache: str, tuned: str, tmp_path: Path
) -> None:
    other = Workspace(ws.root, ws.family)
    theirs = noted(cache, tmp_path / "theirs", weights=weights_fingerprint(tuned), teacher=tuned)
    with pytest.raises(ConfigError, match="theirs"):
        recover(other.model, cache, tmp_path, CachedTeacher(), theirs)


@pytest.mark.parametrize("weights", ["0123456789abcdef", None], ids=["of another kind", "unknown"])
def test_where_weights_cannot_be_compared_names_are_and_another_one_is_warned_of(
    ws: Workspace, cache: str, tuned: str, tmp_path: Path, weights: str | None
) -> None:
    there = Cache(noted(cache, tmp_path / "cache", weights=weights))
    with pytest.warns(UserWarning, match="cache: teacher"):
        check_origin(there, weights_fingerprint(tuned), tuned, None)
    there = Cache(noted(cache, tmp_path / "revision", weights=weights, revision="v1"))
    with pytest.warns(UserWarning, match="revision v2"):
        check_origin(there, weights_fingerprint(ws.model), ws.model, "v2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_origin(there, weights_fingerprint(ws.model), ws.model, "v1")


@pytest.mark.parametrize("form", [{"quantize": "int8"}, {"dtype": "bfloat16"}])
def test_a_cache_of_the_parent_in_another_form_is_known_to_be_of_it(
    ws: Workspace, tuned: str, tmp_path: Path, form: dict[str, Any]
) -> None:
    """What is compared is what is stored, however it was loaded."""
    module = CacheTeacher(ws.model, str(tmp_path / "cache"), count_seconds=0, **form)
    Trainer(**BARE).predict(module, datamodule=ws.corpus())
    there = Cache(str(tmp_path / "cache"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_origin(there, weights_fingerprint(ws.model), "elsewhere", None)
    with pytest.raises(ConfigError, match="cache: teacher"):
        check_origin(there, weights_fingerprint(tuned), ws.model, None)


def test_a_resume_from_a_cache_of_another_teacher_or_validation_is_refused(
    ws: Workspace, cache: str, tuned: str, tmp_path: Path
) -> None:
    theirs = noted(cache, tmp_path / "theirs", weights=weights_fingerprint(tuned))
    copied = noted(cache, tmp_path / "copied")
    answers = ws.write("answers", supervise="answer")
    saved = CachedCorpus(tokenizer=ws.model, train=cache, validation=cache).state_dict()
    CachedCorpus(tokenizer=ws.model, train=copied, validation=copied).load_state_dict(saved)
    for train, validation, key in [
        (theirs, cache, r"train\.teacher"),
        (cache, theirs, r"validation\.teacher"),
        (cache, answers, r"validation\.corpus"),
        (cache, None, "validation"),
    ]:
        other = CachedCorpus(tokenizer=ws.model, train=train, validation=validation)
        with pytest.raises(ConfigError, match=rf"data\.init_args\.{key} was .* and is now"):
            other.load_state_dict(saved)
        other.accepted = ["data.init_args.train", "data.init_args.validation"]
        with pytest.warns(UserWarning, match="accepted"):
            other.load_state_dict(saved)


def test_a_cache_notes_the_type_and_one_that_did_not_is_still_read(cache: str, tmp_path: Path) -> None:
    manifest = Manifest.load(cache)
    assert manifest is not None
    assert manifest.dtype == "float32"
    assert torch.float32 == load_model(manifest.teacher).dtype
    from src.cache.manifest import _digest

    old = tmp_path / "old" / "part-0"
    shutil.copytree(f"{cache}/part-0", old)
    content = json.loads((old / "manifest.json").read_text())
    del content["dtype"], content["digest"]
    content["digest"] = _digest(content)
    (old / "manifest.json").write_text(json.dumps(content, indent=2) + "\n")
    assert Cache(str(old.parent)).about == replace(manifest, dtype=None)
