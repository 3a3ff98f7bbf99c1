"""The recipe for Qwen3-32B: its commands run on a tiny Qwen3 and two ranks; its figures are those of plan."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoModelForCausalLM

from src.cache import Cache
from src.cli import run
from src.mask import Mask
from src.models.loading import load_config, load_model
from tests.blocks import run_by
from tests.data_tools import THINKING, byte_tokenizer, write_rows
from tests.distributed.launch import in_a_group
from tests.tiny import tiny_model

PATH = Path("docs/recipe_qwen3_32b.md")
PAGE = PATH.read_text()
ROOT, RANKS, LAYERS = Path.cwd(), 2, 8
GIB, GB = 2**30, 1e9


BLOCKS = run_by("tests/integration/test_recipe.py", [PATH])
COMMANDS = [command for block in BLOCKS for command in block.commands]
RECIPE = [command for command in COMMANDS if command[0] != "plan"]
PLANS = [command for command in COMMANDS if command[0] == "plan"]


def test_the_recipe_is_what_the_page_plans() -> None:
    """A plan has the very files of its stage, in the same order, and all stages have the same devices."""
    trained = [command for command in RECIPE if command[0] in ("fit", "predict")]
    for command, plan in zip(trained, PLANS, strict=True):
        assert plan[0] == "plan"
        assert plan[1 : len(command)] == command[1:]
    overlays = [yaml.safe_load(path.read_text()) for path in Path("configs/recipes/qwen3_32b").glob("*.yaml")]
    assert {overlay["trainer"]["devices"] for overlay in overlays} == {8}
    assert RECIPE[0][RECIPE[0].index("--part") + 1] == "$part/8"


# ---------------------------------------------------------------------- what it costs


def table() -> dict[str, list[str]]:
    """The cells of the page's table, by stage."""
    (rows,) = re.findall(r"<!-- plan -->\n(.*?)<!-- /plan -->", PAGE, re.S)
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows.strip().splitlines()[2:]]
    return {name: rest for name, *rest in cells}


def cells(plan: dict[str, Any]) -> list[str]:
    """What the page says of a stage: tokens, hours, GiB of a device, GB on disk."""
    way, trained = plan["configured"], plan["parameters"]["trained"]
    disk = {"search": 0, "cache": plan["cache_bytes"]["expected"], "recover": 2 * 12 * (trained or 0)}
    size = f"{disk[plan['stage']] / GB:.1f}" if disk[plan["stage"]] else "-"
    tokens = f"{plan['tokens'] / 1e6:,.1f} M"
    return [tokens, f"{way['hours']:.1f}", f"{way['total'] / GIB:.1f}", size]


@pytest.mark.slow
@pytest.mark.parametrize("command", PLANS, ids=["search", "cache", "recover"])
def test_the_figures_of_the_page_are_those_of_plan(command: list[str], tmp_path: Path) -> None:
    run([*command, "--json", str(tmp_path / "plan.json")])
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["configured"]["fits"]
    assert (plan["configured"]["ranks"], plan["configured"]["strategy"]) == (8, "fsdp2")
    assert table()[plan["stage"]] == cells(plan)


def test_what_the_page_computes_by_hand() -> None:
    """Weights, cached keys and values, what ranks hold on the host, and that a device holds one model."""
    config = load_config("configs/models/qwen3-32b.json")
    with torch.device("meta"):
        parent = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    assert f"{2 * parent / GIB:.1f} GiB in bf16" in PAGE
    assert f"{token / 2**20:.2f} MiB for each token" in PAGE
    assert f"{4096 * token / GIB:.1f} GiB a row" in PAGE
    assert f"{2 * parent / GB:.1f} GB in bf16 for search and cache, {4 * parent / GB:.1f} GB in" in PAGE
    assert f"{8 * 4 * parent / 1e12 + 0.05:.1f} TB" in PAGE
    layer = (parent - 2 * config.vocab_size * config.hidden_size - config.hidden_size) // 64
    assert f"{2 * (parent - 16 * layer) / GB:.1f} GB each" in PAGE
    for command in (each for each in RECIPE if "--max-new-tokens" in each):
        rows, new = (int(command[command.index(key) + 1]) for key in ("--batch-size", "--max-new-tokens"))
        assert 2 * parent + rows * (new + 512) * token < 0.97 * 79 * GIB
    assert 2 * parent * (1 + 48 / 64) > 79 * GIB


# ---------------------------------------------------------------------- the run


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Qwen3 of eight layers whose template thinks; it ends an answer within some ten tokens."""
    path = tmp_path_factory.mktemp("qwen3")
    template = THINKING + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    tokenizer = byte_tokenizer(template)
    tokenizer.eos_token = "<|im_end|>"
    model = tiny_model(
        "qwen3", num_hidden_layers=LAYERS, vocab_size=len(tokenizer), layer_types=["full_attention"] * LAYERS,
        sliding_window=None, use_sliding_window=False, max_position_embeddings=512, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, attn_implementation="sdpa",
    )  # fmt: skip
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(20, 50)]
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def smaller(command: list[str], parent: str) -> list[list[str]]:
    """A command of the page, with another model, shorter rows and two devices in place of eight."""
    command = [{"Qwen/Qwen3-32B": parent, "AI-MO/NuminaMath-CoT": "prompts.jsonl"}.get(w, w) for w in command]
    verb, small = command[0], ["--device", "cpu", "--dtype", "float32"]
    if verb == "generate":
        small += ["--limit", "24", "--split", "train", "--max-new-tokens", "24", "--batch-size", "4"]
        parts = range(RANKS if "$part/8" in command else 1)
        return [
            [w.replace("$part/8", f"{k}/{RANKS}").replace("$part", str(k)) for w in command] + small
            for k in parts
        ]
    if verb in ("fit", "predict"):
        keys = {"trainer.accelerator": "cpu", "trainer.devices": RANKS, "trainer.precision": "32-true"}
        if not any("recover.yaml" in word for word in command):
            keys |= {"model.init_args.model": parent, "data.init_args.max_length": 96}
        if any("search.yaml" in word for word in command):
            keys |= {"trainer.max_steps": 3, "model.init_args.calibration_batches": 2}
        return [[*command, *(f"--{key}={value}" for key, value in keys.items())]]
    if verb == "evaluate" and "--tasks" in command:
        small += ["--limit", "2", "--max-new-tokens", "8"]
    if verb == "benchmark":
        small += ["--repeats", "1", "--new-tokens", "2", "--prompt-tokens", "8"]
    return [[*command, *small] if verb in ("evaluate", "benchmark") else command]


@pytest.mark.slow
def test_the_whole_recipe_runs_on_a_tiny_model(
    parent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Text, search, cache, recovery by FSDP2 on two ranks, export, judgement, speed, report: in order."""
    problems = [
        {"source": "x", "problem": f"{n}+1?", "solution": f"{n + 1}", "messages": [
            {"role": "user", "content": f"{n}+1?"}, {"role": "assistant", "content": f"{n + 1}"}]}
        for n in range(30)
    ]  # fmt: skip
    write_rows(tmp_path / "prompts.jsonl", problems)
    write_rows(tmp_path / "math_500.jsonl", [{"problem": "1+1?", "answer": "2"}] * 3)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
    }
    judged = importlib.util.find_spec("lm_eval") is not None
    assert [command[0] for command in RECIPE] == [
        *("generate", "generate", "fit", "predict", "fit", "export", "export"),
        *("evaluate", "evaluate", "benchmark", "report"),
    ]  # fmt: skip
    for command in RECIPE:
        for argv in smaller(command, parent):
            if "--tasks" in argv and not judged:
                continue  # needs the extra
            if argv[0] in ("fit", "predict"):  # they start a process for each rank
                done = in_a_group([sys.executable, "-m", "src.cli", *argv], environment)
                assert done.returncode == 0, (argv, done.stderr[-3000:])
            else:
                run(argv)
    capsys.readouterr()
    check(tmp_path / "logs/qwen3_32b", parent, judged)


def check(out: Path, parent: str, judged: bool) -> None:
    """Each stage has worked on what the one before has left."""
    rows = [
        json.loads(line) for path in sorted(out.glob("own-*.jsonl")) for line in path.read_text().splitlines()
    ]
    asked = [row["messages"][0]["content"] for row in rows]
    assert len(asked) == len(set(asked)) > 4, "every prompt at most once"
    records = [json.loads(path.read_text()) for path in out.glob("own-*.record.json")]
    assert sum(record["rows"] + record["unfinished"] for record in records) == 24

    mask = Mask.load(out / "search/mask.json")
    assert (mask.model, mask.num_layers, len(mask.removed)) == (parent, LAYERS, LAYERS // 4)
    cache = Cache(str(out / "cache"))
    assert cache.about.k == 10
    assert len(list((out / "cache").glob("part-*"))) == RANKS
    read = [cache.read(index) for index in range(len(cache.shards))]
    said = [row for row in rows if row["messages"][1]["content"].strip()]
    assert sum(len(part.lengths) for part in read) == len(said)

    recovered = json.loads((out / "recover/record.json").read_text())
    assert recovered["distinct_tokens"] == sum(int(part.lengths.sum()) for part in read), "the cache, once"
    batches = sum(-(-len(part.lengths) // RANKS) for part in read)
    assert recovered["steps"] == -(-batches // 4)
    settings = yaml.safe_load((out / "recover/config.yaml").read_text())
    assert settings["trainer"]["strategy"]["class_path"].endswith("FSDP2")
    assert settings["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 1e-5
    cut, short = (load_model(str(out / name), dtype="auto") for name in ("cut", "recovered"))
    weights = sum(p.numel() for p in short.parameters())
    parts = FileSystemReader(out / "recover/checkpoints/last.ckpt").read_metadata().state_dict_metadata
    held = [about for about in parts.values() if isinstance(about, TensorStorageMetadata)]
    size = sum(about.size.numel() * about.properties.dtype.itemsize for about in held)
    counters = 4 * len(list(short.parameters()))  # of the optimiser's steps
    assert size == 12 * weights + counters, "12 bytes a weight, as the page says"
    (saves,) = (
        each["init_args"]
        for each in settings["trainer"]["callbacks"]
        if "LastCheckpoint" in each["class_path"]
    )
    assert (saves["save_top_k"], saves["save_last"]) == (1, True), "two are kept, as the page says"

    assert len(short.model.layers) == LAYERS - LAYERS // 4
    moved = [not torch.equal(a, b) for a, b in zip(cut.parameters(), short.parameters(), strict=True)]
    assert any(moved), "the recovery has learned"
    report = json.loads((out / "report.json").read_text())
    assert [model["name"] for model in report["models"]] == ["teacher", "cut", "recovered"]
    assert all("decode" in model for model in report["models"][1:])
    assert ("tasks" in report["models"][2]) == judged
    if judged:
        tasks = json.loads((out / "tasks.json").read_text())
        assert tasks["tasks"]["math_500_local"]["documents"] == 2
