"""Every command block of the pages is run by what its marker names, or the marker says why nothing does."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from src.cli import run
from src.data.arithmetic import build_tokenizer
from src.export import proof
from src.export.fresh import verify
from src.mask import Mask
from tests.blocks import PAGES, Block, blocks, run_by
from tests.data_tools import write_rows
from tests.tiny import tiny_model

HERE = "tests/integration/test_pages.py"
SHOWN = [block for page in PAGES for block in blocks(page)]
BLOCKS = [block for block in SHOWN if block.language == "bash" or block.kind]
STARTS = r"(?:python|pip|make|torchrun|srun|vllm|llama-cli|mkdocs|\$) "
"""How a line begins that is typed in a shell."""


def name(block: Block) -> str:
    return f"{block.page.stem}: {block.text.strip().splitlines()[-1].strip()[:50]}"


@pytest.mark.parametrize("block", BLOCKS, ids=name)
def test_a_block_says_what_runs_it_or_why_nothing_does(block: Block) -> None:
    assert block.kind, "put '<!-- run: FILE -->' or '<!-- not run: why -->' on the line above"
    if block.kind == "not run":
        assert len(block.how.split()) > 3, "a reason"
    elif block.how.startswith("make "):
        assert re.search(rf"^{block.how[5:]}:", Path("Makefile").read_text(), re.M)
    elif block.how != HERE:
        source = Path(block.how).read_text()
        assert "run_by(" in source or all(re.search(rf"\b{verb}\b", source) for verb, *_ in block.commands)


def test_commands_stand_in_blocks_that_are_marked() -> None:
    for block in SHOWN:
        if block.language != "bash":
            assert not re.search(rf"^\s*{STARTS}", block.text, re.M), "a command: call the block bash"


# ---------------------------------------------------------------------- the run

RUN = run_by(HERE)
MODELS = ("MODEL", "models/stories260k", "Qwen/Qwen3-0.6B")
TEXTS = (
    "train.jsonl",
    "held_out.jsonl",
    "questions.jsonl",
    "logs/demo/data/train.jsonl",
    "logs/demo/data/validation.jsonl",
)
STORIES = "data/tinystories_val.jsonl"
MASKS = (
    "MASK",
    "logs/search/version_0/mask.json",
    "logs/search/mine/mask.json",
    "logs/demo/search/mask.json",
)
LAYERS = 8
SEARCH = "configs/search/gumbel_topk.yaml"
RECOVER, CACHED = "configs/recover/entropy_kd.yaml", "configs/cache/recover.yaml"
"""The second reads what a cache holds, wherever its text came from."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, corpus_file: str) -> Path:
    """A directory with all that the pages take for given: models, texts, masks, runs and exports."""
    place = tmp_path_factory.mktemp("pages")
    for folder in ("configs", "assets"):
        (place / folder).symlink_to(Path.cwd() / folder)
    tokenizer = build_tokenizer()
    small = {"num_hidden_layers": LAYERS, "vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1}
    whole = {"layer_types": ["full_attention"] * LAYERS, "sliding_window": None, "use_sliding_window": False}
    model = tiny_model("qwen3", **small, **whole, bos_token_id=None, max_position_embeddings=512)
    for name in MODELS:
        model.save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    for name in (*TEXTS, *MASKS, STORIES):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
    for name in TEXTS:
        shutil.copy(corpus_file, place / name)
    write_rows(place / STORIES, [{"text": "3 + 4 = 7."}] * 4)
    for name in MASKS:
        Mask.by_hand(str(place / "MODEL"), LAYERS, (0, 1, 3, 4, 6, 7)).save(place / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(proof, "in_fresh_process", verify)
        run(smaller(["fit", "--config", RECOVER, "...", "--trainer.logger.init_args.version=mine"]))
        shutil.copytree("logs/recover/mine", "logs/demo/recover")
        checkpoint = "logs/recover/mine/checkpoints/last.ckpt"
        run(["export", "--mask", "MASK", "--checkpoint", checkpoint, "--out", "my-shorter-model"])
        run(smaller(["fit", "--config", SEARCH, "...", "--trainer.logger.init_args.version=one"]))
        shutil.copytree("my-shorter-model", "logs/cut")
        shutil.copytree("logs/search/one", "logs/search/two")
    return place


def smaller(command: list[str]) -> list[str]:
    """A command of a page for a tiny model: its ``...`` filled in, and a few steps where many are meant."""
    verb, searches = command[0], SEARCH in command
    keys: dict[str, Any] = {}
    if "..." in command:
        keys = {"data.init_args.train": "train.jsonl", "data.init_args.validation": "held_out.jsonl"}
        keys = {} if CACHED in command else keys
        keys |= {"model.init_args.mask": "MASK"} if RECOVER in command else {"model.init_args.model": "MODEL"}
        keys = {key: value for key, value in keys.items() if f"--{key}" not in command}
    if verb in ("fit", "predict"):
        keys |= {"trainer.accelerator": "cpu", "data.init_args.batch_size": 4}
    if verb == "fit":
        keys |= {"trainer.max_steps": 2, "trainer.limit_val_batches": 1}
        keys |= {"model.init_args.calibration_batches": 1} if searches else {}
    short = ["--limit", "4", "--max-new-tokens", "4"] if verb in ("evaluate", "generate") else []
    sizes = {"13": "7", "14": "", "15": ""}  # of a parent of 16 layers
    given = (sizes.get(word, word) for word in command if word != "...")
    return [*filter(None, given), *(f"--{key}={value}" for key, value in keys.items()), *short]


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({block.page for block in RUN}), ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(
    page: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each page begins with what the pages take for given, and with nothing that another one has made."""
    monkeypatch.chdir(shutil.copytree(place, tmp_path / "place", symlinks=True))
    for line in (line for block in RUN if block.page == page for line in block.lines):
        if "src.cli" in line:
            run(smaller(line[line.index("src.cli") + 1 :]))
        elif line[:2] == ["python", "-m"]:
            monkeypatch.setattr(sys, "argv", line[2:])
            runpy.run_module(line[2], run_name="__main__")
        else:
            assert line[:2] == ["python", "-c"], line
            exec(line[2], {})


# ---------------------------------------------------------------------- the site

SITE = Path("docs/site/mkdocs.yml")


def entries(nav: Any) -> list[str]:
    """Files of a menu, however deep."""
    if isinstance(nav, str):
        return [nav]
    return [name for part in (nav.values() if isinstance(nav, dict) else nav) for name in entries(part)]


def test_every_page_is_in_the_menu_of_the_site_once() -> None:
    ours = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
    pages = [ours.get(str(page)) or str(page.relative_to("docs")) for page in PAGES]
    assert sorted(entries(yaml.safe_load(SITE.read_text())["nav"])) == sorted(pages)


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings", reason="needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(SITE), "-d", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    front = (tmp_path / "index.html").read_text()
    assert 'href="export/#to-the-hub"' in front
    assert "GumbelTopK" in (tmp_path / "reference/policies/index.html").read_text()
    assert "class_path: src.policies" in re.sub(
        "<.*?>", "", (tmp_path / "files/configs/policy/index.html").read_text()
    )
    assert "No test runs this: vLLM" in (tmp_path / "export/index.html").read_text()
