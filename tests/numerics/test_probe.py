"""A probe that shares prefixes measures what one without them does, to the last bit, with fewer layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from src.data.arithmetic import build_tokenizer, problems
from src.data.batches import Batch, Packed
from src.data.encode import TokenRow
from src.mask import Unit
from src.plan.toy import CountingProbe
from src.policies import SLEB, Exhaustive, GumbelTopK, LayerKL, MaskPolicy
from src.policies.probe import CalibrationProbe
from src.policies.settle import settle
from src.search import MaskSearch
from tests.marks import slow

BATCHES, PLENTY = 6, 10**6


def batches() -> list[Batch]:
    """Rows of several lengths, padded on the left."""
    tokenizer = build_tokenizer()
    tokenizer.padding_side, made = "left", list[Batch]()
    for seed in range(BATCHES):
        texts = [row["question"] for row in problems("train", 3, seed)]
        rows = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
        made.append({**rows, "labels": rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)})
    return made


def packed() -> list[Batch]:
    """Rows of several documents each, without an attention mask."""
    texts = [problem["question"] for problem in problems("train", 40, 0)]
    ids = build_tokenizer()(texts, return_token_type_ids=False).input_ids
    packing = Packed(batch_size=2, max_length=2 * max(map(len, ids)), pad_id=0)
    plan = packing.plan([TokenRow(row, row, "") for row in ids], None)
    return [packing.collate(rows) for rows in plan[:BATCHES]]


def probe_of(
    teacher_dir: str,
    policy: MaskPolicy,
    unit: Unit,
    gib: float,
    rows: Callable[[], list[Batch]] = batches,
    mesh: DeviceMesh | None = None,
    **loading: Any,
) -> CalibrationProbe:
    """A probe of a search without its trainer."""
    search = MaskSearch(teacher_dir, policy, remove=2, unit=unit, calibration_batches=BATCHES, **loading)
    search._device_mesh = mesh
    search.configure_model()
    strategy = SimpleNamespace(reduce=lambda x, reduce_op: x)
    trainer: Any = SimpleNamespace(world_size=1, strategy=strategy)
    trainer.datamodule = SimpleNamespace(val_dataloader=rows)
    search._trainer = trainer
    return CalibrationProbe(search, gib)


def made(name: str) -> MaskPolicy:
    """A policy that measures: each unit alone, greedily, all masks, or swaps."""
    if name == "polish":
        return GumbelTopK(init="random", candidates=1, polish=True)
    return {"start": LayerKL, "sleb": SLEB, "exhaustive": Exhaustive}[name]()


def work(policy: MaskPolicy, probe: Any, name: str) -> tuple[Any, ...]:
    """Let a policy measure; return what it ends with."""
    policy.initialise(probe)
    if name == "polish":
        return settle(policy, probe, ())
    return policy.harden(), policy.logits.tolist()


@pytest.mark.parametrize("unit", ["layer", "half"])
@pytest.mark.parametrize("name", ["start", "polish", "sleb", slow("exhaustive")])
def test_shared_prefixes_change_no_bit_and_a_plan_counts_their_layers(
    name: str, unit: Unit, teacher_dir: str
) -> None:
    """Little memory keeps streams in front of some units, and none of other batches."""
    ends, layers = [], []
    stream = streams_gib(teacher_dir)
    for gib in (0.0, 4.5 * stream, 1.0):
        policy = made(name)
        probe = probe_of(teacher_dir, policy, unit, gib)
        ends.append(work(policy, probe, name))
        layers.append(probe.search.gates.evaluated)
        assert len(probe.memory) <= probe.memory.limit
        assert probe.memory.every == {0.0: None, 1.0: 1}.get(gib, 2 if unit == "layer" else 4)
    assert ends[0] == ends[1] == ends[2]
    assert layers[0] > layers[1] > layers[2]
    if name in ("start", "exhaustive"):  # what these measure does not hang on the values
        counting = CountingProbe(12 if unit == "half" else 6, BATCHES)
        policy = made(name)
        policy.setup(6, 2, unit=unit)
        work(policy, counting, name)
        tried = sum(range(1, 6)) + 6 + 6 if unit == "layer" else 6 + 6 + sum(range(1, 12)) / 2
        assert layers[2] - tried == pytest.approx(6 * counting.forward)


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["layer", "half"])
@pytest.mark.parametrize("way", ["packed", "int8", "fsdp2"])
def test_prefixes_are_shared_of_packed_rows_and_of_weights_in_8_bits_or_in_parts(
    way: str, unit: Unit, teacher_dir: str, tmp_path: Path
) -> None:
    """Values and choices are equal to the last bit, and fewer layers run."""
    ends, layers, given = [], [], dict[str, Any]()
    if way == "fsdp2":
        store = dist.FileStore(str(tmp_path / "store"), 1)
        dist.init_process_group("gloo", rank=0, world_size=1, store=store)
        given["mesh"] = init_device_mesh("cpu", (1,), mesh_dim_names=("data_parallel",))
    elif way == "int8":
        given["quantize"] = "int8"
    else:
        given["rows"] = packed
    try:
        for gib in (0.0, 1.0):
            policy = SLEB()
            probe = probe_of(teacher_dir, policy, unit, gib, **given)
            ends.append(work(policy, probe, "sleb"))
            layers.append(probe.search.gates.evaluated)
            assert probe.memory.every == (1 if gib else None)
            if way == "fsdp2":
                assert isinstance(next(probe.search.gates.layers.parameters()), DTensor)
    finally:
        if way == "fsdp2":
            dist.destroy_process_group()
    assert ends[0] == ends[1]
    assert layers[0] > 1.1 * layers[1]


def streams_gib(teacher_dir: str) -> float:
    """Memory of one stream of the largest batch."""
    tokens = max(batch["input_ids"].numel() for batch in batches())
    return tokens * 16 * 4 / 2**30


def test_memory_is_counted_in_streams(teacher_dir: str) -> None:
    probe = probe_of(teacher_dir, LayerKL(), "layer", 7.9 * streams_gib(teacher_dir))
    assert probe.memory.limit == 7


@pytest.mark.parametrize(
    ("name", "layers", "remove", "fewer"),
    [("start", 16, 4, 1.8), ("sleb", 16, 4, 1.8), slow("exhaustive", 16, 4, 2.5), ("start", 30, 8, 1.8),
     ("polish", 30, 8, 1.5), ("sleb", 30, 8, 1.8)],
)  # fmt: skip
def test_how_many_fewer_layers_run(name: str, layers: int, remove: int, fewer: float) -> None:
    passes = []
    for limit in (PLENTY, 0):
        policy, probe = made(name), CountingProbe(layers, 16, limit)
        policy.setup(layers, remove)
        work(policy, probe, name)
        passes.append(probe.forward)
    assert passes[1] >= fewer * passes[0]
