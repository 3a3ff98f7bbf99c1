"""Masks of width from the search to the export: every policy that takes them, every step behind it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from src import policies
from src.cli import main, run
from src.data.arithmetic import build_tokenizer
from src.mask import Mask
from src.policies import MaskPolicy
from tests.integration.test_overlays import SEARCH, arguments
from tests.marks import slow

LAYERS, CHANNELS, GROUPS = 6, 24, 4


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random 6-layer Llama of 24 channels and 4 KV groups, with the arithmetic tokenizer."""
    path, tokenizer = tmp_path_factory.mktemp("llama"), build_tokenizer()
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), hidden_size=24, intermediate_size=CHANNELS,
        num_hidden_layers=LAYERS, num_attention_heads=8, num_key_value_heads=GROUPS, head_dim=4,
        tie_word_embeddings=True, initializer_range=0.2, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def search(out: Path, teacher: str, corpus: str, unit: str, policy: str, **keys: Any) -> Mask:
    given = {
        "trainer.max_steps": 2, "model.init_args.model": teacher, "model.init_args.calibration_batches": 2,
        "model.init_args.policy": f"src.policies.{policy}", **keys,
    }  # fmt: skip
    overlay = f"configs/unit/{unit}.yaml"
    if policy != "GumbelTopK":
        given["model.init_args.policy.init_args.polish"] = "false"
    run(["fit", "--config", SEARCH, "--config", overlay, *arguments(out, corpus, **given)])
    return Mask.load(out / "search" / "run" / "mask.json")


TAKERS = {
    unit: sorted(
        name for name, each in vars(policies).items()
        if isinstance(each, type) and issubclass(each, MaskPolicy) and unit in each.works_on
        and name != "PromptMasks"  # of another search
    )
    for unit in ("kv_group", "channel")
}  # fmt: skip


QUICK = [("channel", "GumbelTopK"), ("channel", "MeanActivation"), ("kv_group", "LayerKL")]


@pytest.mark.parametrize(
    ("unit", "policy"),
    [
        pytest.param(u, name, marks=[] if (u, name) in QUICK else pytest.mark.slow)
        for u, names in TAKERS.items() for name in names
    ],
)  # fmt: skip
def test_a_policy_learns_a_mask_of_width(
    unit: str, policy: str, tmp_path: Path, llama_dir: str, corpus_file: str
) -> None:
    keys = {"model.init_args.calibration_batches": 1} if policy == "Exhaustive" else {}
    mask = search(tmp_path, llama_dir, corpus_file, unit, policy, **keys)
    width = {"kv_group": GROUPS, "channel": CHANNELS}[unit]
    assert (mask.unit, mask.method, mask.width, mask.depth) == (unit, policy, width, LAYERS)
    assert [len(kept) for kept in mask.by_layer] == [width - width // 4] * LAYERS
    file = json.loads((tmp_path / "search" / "run" / "mask.json").read_text())
    assert file["keep"] == mask.by_layer
    gates = json.loads((tmp_path / "search" / "run" / "gates.json").read_text())["keep_probability"]
    assert len(gates[-1]) == LAYERS


def random_mask(teacher: str, unit: str, width: int, keep: int) -> Mask:
    generator = torch.Generator().manual_seed(3)
    kept = [sorted(torch.randperm(width, generator=generator)[:keep].tolist()) for _ in range(LAYERS)]
    units = tuple(layer * width + own for layer, each in enumerate(kept) for own in each)
    return Mask(teacher, LAYERS, units, "by hand", unit=unit, width=width)  # type: ignore[arg-type]


@pytest.mark.parametrize(("unit", "scope"), [("channel", "full"), slow("kv_group", "lora")])
def test_a_narrower_model_is_recovered_exported_and_judged(
    unit: str, scope: str, tmp_path: Path, llama_dir: str, corpus_file: str
) -> None:
    width, keep = {"channel": (CHANNELS, 17), "kv_group": (GROUPS, 3)}[unit]
    mask_file = tmp_path / "search" / "mask.json"
    random_mask(llama_dir, unit, width, keep).save(mask_file)
    keys = {
        "trainer.max_steps": 2, "model.init_args.mask": mask_file, "model.init_args.scope": scope,
        "model.init_args.lora_rank": 2,
        "model.init_args.terms": "[{term: {class_path: src.losses.HiddenStates}}]",
    }  # fmt: skip
    run(["fit", "--config", "configs/recover/entropy_kd.yaml", *arguments(tmp_path, corpus_file, **keys)])
    checkpoint, out = tmp_path / "recover" / "run" / "checkpoints" / "last.ckpt", tmp_path / "recovered"
    main(["export", "--mask", str(mask_file), "--checkpoint", str(checkpoint), "--out", str(out)])
    card = (out / "README.md").read_text()
    words = {"channel": "17 of 24 channels", "kv_group": "3 of 4 KV groups"}[unit]
    assert f"| Layers | 6, all of the parent |\n| Kept | {words} of each layer |" in card
    assert re.search(r"\| logits = original, gated parent \| differ by \d\.\de[-+]0\d of", card)
    assert "| logits = original | equal to the last bit |" in card
    config = AutoModelForCausalLM.from_pretrained(out).config
    assert config.num_hidden_layers == LAYERS
    assert config.intermediate_size == (17 if unit == "channel" else CHANNELS)
    assert (config.num_attention_heads, config.num_key_value_heads) == (
        (8, 4) if unit == "channel" else (6, 3)
    )
    assert config.head_dim == 4
    rows = ["--data", corpus_file, "--out", str(tmp_path / "evaluate.json")]
    main(["evaluate", "--teacher", llama_dir, "--model", str(out), *rows])
    measured = ["--out", str(tmp_path / "benchmark.json"), "--repeats", "1", "--new-tokens", "2"]
    main(["benchmark", "--baseline", llama_dir, "--model", str(out), *measured])
    ideal = json.loads((tmp_path / "benchmark.json").read_text())["measured"][1]["decode"]["ideal"]
    assert ideal > 1.02
    main(["report", "--run", str(tmp_path)])
    assert "of each layer removed" in (tmp_path / "report.md").read_text().splitlines()[0]


def test_depth_then_width_and_width_then_depth_are_composed_to_the_end(
    tmp_path: Path, llama_dir: str, corpus_file: str
) -> None:
    """A search on an export of the other kind; the last card and config name each step."""
    first, second, third = (tmp_path / name for name in ("shallower", "narrower", "again"))
    Mask.by_hand(llama_dir, LAYERS, (0, 1, 3, 5)).save(tmp_path / "depth.json")
    main(["export", "--mask", str(tmp_path / "depth.json"), "--out", str(first)])
    mask = search(tmp_path, str(first), corpus_file, "channel", "GumbelTopK")
    assert (mask.num_layers, mask.width) == (4, CHANNELS)
    found = str(tmp_path / "search" / "run" / "mask.json")
    main(["export", "--mask", found, "--out", str(second)])
    card = (second / "README.md").read_text()
    assert f"| Earlier cuts | from `{Path(llama_dir).name}`: 4 layers kept |" in card
    assert "| Kept | 18 of 24 channels of each layer |" in card
    Mask.by_hand(str(second), 4, (0, 2, 3)).save(tmp_path / "depth.json")
    main(["export", "--mask", str(tmp_path / "depth.json"), "--out", str(third)])
    config = json.loads((third / "config.json").read_text())
    assert config["depth_pruning"]["before"]["keep"] == [0, 1, 3, 5]
    assert config["width_pruning"]["removed"] == "6 of 24 channels of each layer"
    model = AutoModelForCausalLM.from_pretrained(third)
    assert (model.config.num_hidden_layers, model.config.intermediate_size) == (3, 18)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"policy": "src.policies.SLEB"}, "model.unit: 'channel' with SLEB"),
        ({"policy.init_args.init": "kl"}, "policy.init: 'kl' takes a pass for each unit"),
        ({"policy.init_args.polish": "true"}, "policy.polish"),
        ({"policy.init_args.always_keep": "[0]"}, r"policy.always_keep: \[0\] are layers"),
        ({"ratio": "null", "remove": 24}, "remove: 24 channels of each layer asked.*Accepted: 1 to 23"),
        ({"adapters": "src.training.adapters.Scales"}, "model.adapters"),
    ],
)
def test_what_makes_no_sense_for_channels_is_refused_before_loading(
    given: dict[str, Any], message: str, tmp_path: Path, llama_dir: str, corpus_file: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    keys = {"model.init_args.model": llama_dir} | {f"model.init_args.{k}": v for k, v in given.items()}
    overlay = "configs/unit/channel.yaml"
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", SEARCH, "--config", overlay, *arguments(tmp_path, corpus_file, **keys)])
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))
    assert not list(tmp_path.glob("**/mask.json"))


def test_what_needs_a_gap_is_refused_for_masks_of_width(
    tmp_path: Path, llama_dir: str, corpus_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mask_file, out = str(tmp_path / "mask.json"), tmp_path / "out"
    random_mask(llama_dir, "channel", CHANNELS, 18).save(mask_file)
    keys = {"model.init_args.mask": mask_file, "model.init_args.scope": "cut_adjacent"}
    recover = [
        "fit",
        "--config",
        "configs/recover/entropy_kd.yaml",
        *arguments(tmp_path, corpus_file, **keys),
    ]
    patch = ["patch", "--mask", mask_file, "--data", corpus_file, "--out", str(out)]
    for command, reason in ((recover, "model.scope: 'cut_adjacent'"), (patch, "patch: it repairs")):
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 2
        assert reason in capsys.readouterr().err
    assert not out.exists()


def test_the_page_names_the_policies_that_take_width() -> None:
    page = Path("docs/units.md").read_text().partition("## Which methods take width")[2]
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.M)) == {*TAKERS["kv_group"], *TAKERS["channel"]}
