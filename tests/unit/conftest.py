"""What several files of unit tests start from: a plan of the arena, an export, a corpus, models to judge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from scripts.arena.plan import Plan
from scripts.arena.reading import read
from src.data.arithmetic import build_tokenizer, problems
from src.export import verb as export
from tests.arena import PLAN
from tests.cached import Workspace, workspace
from tests.tiny import tiny_model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files of the plan."""
    monkeypatch.chdir(tmp_path)
    for name in ("search", "recover", "cache", "tail"):
        Path(f"{name}.yaml").write_text(f"# a comment\nmodel: {name}\n")
    Path("teacher").mkdir()
    Path("teacher/config.json").write_text("{}")
    Path("plan.yaml").write_text(yaml.safe_dump(PLAN, sort_keys=False))
    return tmp_path


@pytest.fixture
def plan(folder: Path) -> Plan:
    return read("plan.yaml")


@pytest.fixture
def run(mask_file: str, tmp_path: Path) -> Callable[..., Path]:
    """Exports the tiny cut model."""

    def export_to(*more: str) -> Path:
        out = tmp_path / "out"
        export.main(["--mask", mask_file, "--out", str(out), *more])
        return out

    return export_to


@pytest.fixture(scope="module")
def ws(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A tiny teacher with a corpus, to write caches of."""
    return workspace(tmp_path_factory.mktemp("ws"))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """The demo's tokenizer."""
    return build_tokenizer()


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    """A dozen problems, with answers that end in ``#### n``."""
    return list(problems("test", 12, seed=0))


@pytest.fixture(scope="module")
def models(tokenizer: PreTrainedTokenizerFast) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Two models of the tokenizer that know nothing of each other."""
    keys = {
        "vocab_size": len(tokenizer),
        "eos_token_id": 1,
        "bos_token_id": None,
        "max_position_embeddings": 256,
    }
    return tiny_model("llama", 0, **keys), tiny_model("llama", 1, num_hidden_layers=5, **keys)
