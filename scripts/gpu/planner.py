"""What the stages held and how fast they were, against what ``plan`` says of the very same commands.

Planned tensors are compared with the allocator's peak; the plan's total, which adds an assumed overhead, with
all that the device had given away when the stage ended.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from scripts.gpu.cases import command
from scripts.gpu.part import options, read, record
from src.errors import ConfigError
from src.plan.devices import FILE, device
from src.plan.experiment import Experiment
from src.plan.memory import OVERHEAD
from src.plan.planner import Planner


def main() -> None:
    args, rows = options(), list[dict[str, Any]]()
    measured = {name: s for name, s in read(args.out).items() if name.startswith("stages/")}
    if not any("peak_bytes" in row for section in measured.values() for row in section.get("rows", [])):
        raise ConfigError("planner: no stage was measured yet. Run the parts under stages/ first.")
    for name, section in measured.items():
        _, shape, variant = name.split("/")
        for row in section.get("rows", []):
            if "peak_bytes" in row:
                about = {"model": section["model"], "variant": variant, "stage": row["stage"]}
                keys = ("peak_bytes", "reserved_bytes", "used_bytes", "tokens_per_s")
                rows.append(
                    about | {key: row.get(key) for key in keys} | plan(args, shape, variant, row["stage"])
                )
                print(json.dumps(rows[-1]), flush=True)
                record(args, {"planned_for": name_of_device(args), "rows": rows})


def plan(args: argparse.Namespace, shape: str, variant: str, stage: str) -> dict[str, Any]:
    """The planner's figures for a case, or why it has none."""
    try:
        experiment = Experiment(command(args, shape, variant, stage)[1:])
        planner = Planner(experiment, device(name_of_device(args)), tokens=1_000_000)
        found = planner.configured
    except ConfigError as e:
        return {"error": str(e)}
    return {
        "planned_tensors": found.total - found.parts[OVERHEAD], "planned_total": found.total,
        "planned_tokens_per_s": planner.tokens / (3600 * found.hours), "parts": found.parts,
    }  # fmt: skip


def name_of_device(args: argparse.Namespace) -> str:
    """The entry of configs/devices.json that this device is; an unknown GPU counts as an H100."""
    if not args.device.startswith("cuda"):
        return "cpu"
    name = torch.cuda.get_device_name().lower()
    return next((key for key in json.loads(FILE.read_text())["devices"] if key in name), "h100")


if __name__ == "__main__":
    main()
