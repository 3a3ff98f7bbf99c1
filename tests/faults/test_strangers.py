"""Nothing of strangers runs: not on a yes at the prompt, not from a pickle, a tokenizer or a template."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from src.cli import main
from src.export import proof
from src.mask import Mask
from tests.faults.directories import VERBS, altered, command, refused, search

CODE = (
    "import os\nos.system('touch {marker}')\nfrom transformers import *\nclass Evil(PreTrainedModel): ...\n"
)


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that appears if a stranger's code runs; whoever asks for trust is told yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    return tmp_path / "ran"


class Evil:
    """Unpickled, it runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def evil_pickle(model: Path, marker: Path) -> None:
    weights: dict[str, Any] = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(weights | {"model.norm.weight": Evil(marker)}, model / "pytorch_model.bin")


def bare_pickle(model: Path, marker: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(marker)))


def evil_family(model: Path, marker: Path) -> None:
    (model / "modeling_evil.py").write_text(CODE.format(marker=marker))
    settings = json.loads((model / "config.json").read_text())
    mapping = {"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    (model / "config.json").write_text(json.dumps(settings | {"model_type": "evil", "auto_map": mapping}))


DAMAGES = [
    (evil_family, "needs code of its own|tokenizer: cannot read"),
    (evil_pickle, "cannot load|holds no weights"),
    (bare_pickle, "cannot load|holds no weights"),
]


@pytest.mark.parametrize(
    ("damage", "message", "verb"),
    [
        pytest.param(*case, verb, marks=() if verb in ("plan", VERBS[number]) else pytest.mark.slow)
        for number, case in enumerate(DAMAGES)
        for verb in VERBS
        if case[0] is evil_family or verb != "plan"  # which reads no weight
    ],
)
def test_what_would_run_is_refused_in_one_message(
    damage: Callable[[Path, Path], None],
    message: str,
    verb: str,
    teacher_dir: str,
    corpus_file: str,
    tmp_path: Path,
    marker: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(model := altered(teacher_dir, tmp_path / "model"), marker)
    Mask(str(model), 6, (0, 2, 3, 5), "test").save(tmp_path / "mask.json")
    told = refused(command(verb, model, tmp_path / "mask.json", corpus_file, tmp_path), capsys)
    assert re.search(message, told), told
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "verb", ["export", pytest.param("search", marks=pytest.mark.slow), "evaluate", "patch"]
)
def test_a_known_family_needs_none_of_the_code_beside_it_and_does_not_pass_it_on(
    verb: str,
    teacher_dir: str,
    corpus_file: str,
    tmp_path: Path,
    marker: Path,
) -> None:
    mapping = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    model = altered(teacher_dir, tmp_path / "model", auto_map=mapping)
    for name in ("evil.py", "tokenization_evil.py", "custom_generate/generate.py"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(CODE.format(marker=marker))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "pretokenized.pkl").write_bytes(pickle.dumps(Evil(marker)))
    Mask(str(model), 6, (0, 2, 3, 5), "test").save(tmp_path / "mask.json")
    main(command(verb, model, tmp_path / "mask.json", corpus_file, tmp_path))
    assert not marker.exists()
    if verb in ("export", "patch"):
        out = tmp_path / "out"
        assert not [file for file in out.rglob("*") if file.suffix in (".py", ".pkl")]
        for name in ("config.json", "tokenizer_config.json"):
            assert "auto_map" not in json.loads((out / name).read_text())


def test_a_pickled_parent_is_read_for_its_tensors_alone_and_named(teacher_dir: str, tmp_path: Path) -> None:
    model = altered(teacher_dir, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(weights, model / "pytorch_model.bin")
    Mask(str(model), 6, (0, 2, 3, 5), "test").save(tmp_path / "mask.json")
    with pytest.warns(
        UserWarning, match=r"pytorch_model\.bin' is a pickle; nothing but its tensors was read"
    ):
        main(["export", "--mask", str(tmp_path / "mask.json"), "--out", str(tmp_path / "out")])
    kept = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(
        kept["model.layers.1.mlp.up_proj.weight"], weights["model.layers.2.mlp.up_proj.weight"]
    )
    assert not list((tmp_path / "out").glob("*.bin"))


TEMPLATES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch {marker}') }}",
    "{% for m in messages %}{{ lipsum.__globals__['os'].system('touch {marker}') }}{% endfor %}",
    "{% for m in messages %}{{ m.content }",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_runs_in_a_sandbox_and_ends_in_one_message(
    template: str, teacher_dir: str, tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = altered(teacher_dir, tmp_path / "model")
    (model / "chat_template.jinja").write_text(template.replace("{marker}", str(marker)))
    rows = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    rows.write_text(json.dumps({"messages": turns}) + "\n")
    for argv in (
        search(model, str(rows), tmp_path / "logs"),
        ["evaluate", "--model", str(model), "--data", str(rows)],
    ):
        assert "template" in refused(argv, capsys)
        assert not marker.exists()


@pytest.mark.fresh
def test_the_fresh_process_reads_nothing_from_a_terminal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: dict[str, Any] = {}

    def run(*_: Any, **keys: Any) -> subprocess.CompletedProcess[str]:
        given.update(keys)
        return subprocess.CompletedProcess([], 1, "", "stopped")

    monkeypatch.setattr(subprocess, "run", run)
    reference = SimpleNamespace(save=lambda path: None)
    assert not proof.in_fresh_process(tmp_path, cast(Any, reference))[0].passed
    assert given["stdin"] == subprocess.DEVNULL


def test_no_load_leaves_the_question_of_trust_open() -> None:
    """Every call of a library that loads by name says trust_remote_code."""
    for file in [*Path("src").rglob("*.py"), *Path("scripts").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = ast.unparse(node.func.value)
                if node.func.attr == "from_pretrained" and owner.startswith("Auto"):
                    assert "trust_remote_code=False" in ast.unparse(node), f"{file}:{node.lineno}"
