"""What every part shares: its options, where a figure comes from, and a section written at once."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import re
import shlex
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from scripts.gpu.catalogue import PARTS
from src.files import write_json
from src.mask import git_sha

LIBRARIES = ("transformers", "lightning", "bitsandbytes", "deepspeed", "peft")


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """The options of a part; ``work`` exists afterwards."""
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=[part.name for part in PARTS])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes and a few steps: a rehearsal")
    parser.add_argument("--seconds", type=int, default=60, help="of each stage")
    parser.add_argument("--out", type=Path, default=Path("results/gpu.json"))
    parser.add_argument("--work", type=Path, default=Path("logs/gpu"))
    parser.add_argument("--commit", help="of the code, where it is a copy without its repository")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return args


def provenance(args: argparse.Namespace) -> dict[str, Any]:
    """Command, commit, device and versions."""
    command = ["bash", "scripts/gpu_checks.sh", args.part]
    command += ["--device", args.device, "--tiny"] if args.tiny else []
    command += ["--seconds", str(args.seconds)] if args.seconds != 60 else []
    name, driver, memory = gpu() if args.device.startswith("cuda") else (platform.machine(), None, None)
    versions = {name: _version(name) for name in LIBRARIES}
    return {
        "command": shlex.join(command),
        "commit": args.commit or git_sha(),
        "device": name,
        "memory_gib": memory,
        "torch": torch.__version__,
        "driver": driver,
        "versions": {name: version for name, version in versions.items() if version},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def gpu() -> tuple[str, str | None, float]:
    """Name, driver and memory (GiB) of the GPU; asked without CUDA, which would take memory of it."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        name, driver, mib = (word.strip() for word in told.splitlines()[0].split(","))
        return name, driver, round(int(mib) / 1024, 1)
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        found = torch.cuda.get_device_properties(0)
        return found.name, None, round(found.total_memory / 2**30, 1)


def read(out: Path) -> dict[str, Any]:
    """The results so far."""
    return json.loads(out.read_text()) if out.exists() else {}


def forget(out: Path, part: str) -> None:
    """Drop a part's figures before it runs again, so that old and new ones never stand together."""
    known = read(out)
    if known.pop(part, None) is not None:
        write_json(out, known)


def record(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Put a part's figures into the results, in the parts' order; the file is replaced whole."""
    known = {**read(args.out), args.part: {**figures, **provenance(args)}}
    write_json(args.out, {part.name: known[part.name] for part in PARTS if part.name in known})


def last_words(text: str, limit: int = 300) -> str:
    """What a failed process said at the end: its error, without the trace that led there."""
    text = re.sub(r"^\[rank\d+\]: ", "", text, flags=re.MULTILINE)
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    lines = [line for line in lines if "CalledProcessError" not in line]  # of a command that said why itself
    telling = [line for line in lines if "Error" in line or line.startswith("error:")]
    return (telling or lines or ["it said nothing"])[-1][:limit]


def environment() -> dict[str, str]:
    """Of a command that a part runs: no network, no colours."""
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "NO_COLOR": "1", "COLUMNS": "130"}
    return {**os.environ, **quiet}
