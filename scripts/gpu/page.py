"""Tables from the results of the GPU parts; nothing on the page is typed by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.lab.pages import table
from src.files import write_text

Section = dict[str, Any]
GIB = 2**30
HEAD = """# On a GPU

What only a GPU can show, measured by `bash scripts/gpu_checks.sh`, part by part, from
[results/gpu.json](../results/gpu.json). A pair that cannot work, or broke, stands here with its message.
"""


def yes(value: bool) -> str:
    return "yes" if value else "**no**"


def laws(found: dict[str, Section]) -> list[str]:
    section = found["laws"]
    rows = (
        (row["model"], row["error"], *"-" * 8)
        if "error" in row
        else (
            row["model"], yes(row["repeats"]), yes(row["open_is_teacher"]), yes(row["hard_is_cut"]),
            f"{row['largest_difference']:.1e}", f"{row['padding']:.1e}", f"{row['cache']:.1e}",
            yes(row["gradient_repeats"]), yes(row["gradient_of_closed_layers_exact"]),
            f"{row['gradient_error']:.1e}",
        )
        for row in section["rows"]
    )  # fmt: skip
    gate = section["export_gate"]
    said = gate.get("error") or "; ".join(f"{check}: {detail}" for check, detail in gate["findings"].items())
    head = "model | runs repeat | open = teacher | hard = cut | largest difference | left padding | cache"
    head += " | gradient repeats | the same without autograd in closed layers | gradient against float32"
    return [
        "Bits of logits and generated tokens in bf16: plain, left-padded, generated with and without the "
        "cache. Differences are shares of the largest logit; padding and cache compare two ways of one "
        f"model, and the export gate accepts {section['tolerance']:g} there.",
        "", *table(head, rows), "", f"Export gate in bf16 on the device: {said}.",
    ]  # fmt: skip


def speed(found: dict[str, Section]) -> list[str]:
    section = found["speed"]
    rows = (
        (row["batch_size"], row["phase"], f"{row['teacher_tokens_per_s']:,.0f}",
         f"{row['tokens_per_s']:,.0f}", f"{row['speedup']:.3f}",
         " - ".join(f"{x:.3f}" for x in row["speedup_iqr"]), f"{row['ideal']:.3f}",
         f"{row['speedup'] / row['ideal']:.0%}")
        for row in section["rows"]
    )  # fmt: skip
    long, short = section["layers"]
    head = f"batch | phase | tokens/s, {long} layers | {short} layers | speed-up | quartiles | ideal | of it"
    return [
        f"{section['model']}, random weights, bf16, {section['attention']}; {section['prompt_tokens']} "
        f"tokens read, {section['new_tokens']} decoded, {section['repeats']} repeats.", "",
        *table(head, rows),
    ]  # fmt: skip


def stages(found: dict[str, Section]) -> list[str]:
    rows, notes = [], {}
    for name, section in found.items():
        for row in section["rows"]:
            notes[section["model"]] = (
                f"{section['model']}: {section['batch_size']} rows of {section['row_tokens']} tokens; "
                f"recovery of `{section['scope']}` in {section['recovery_dtype']} ({section['why']})."
            )
            told = row.get("error") or row.get("refused")
            speed_told = f"{row['tokens_per_s']:,.0f}" if row.get("tokens_per_s") else "-"
            peak = f"{row['peak_bytes'] / GIB:.1f}" if "peak_bytes" in row else "-"
            word = ("refused: " if "refused" in row else "failed: ") if told else f"{row['steps']} steps"
            about = section["model"], name.split("/")[2], row["stage"]
            rows.append((*about, speed_told, peak, f"{word}{told or ''}"))
    return [*notes.values(), "", *table("model | variant | stage | tokens/s | peak, GiB | note", rows)]


TABLES: dict[str, tuple[str, Callable[[dict[str, Section]], list[str]]]] = {
    "laws": ("Exactness in bf16", laws),
    "speed": ("Prefill and decode of the shortened model", speed),
    "stages": ("Search, cache and recovery", stages),
}


def write(results: dict[str, Section], out: Path) -> None:
    """Write the whole page."""
    lines = [HEAD]
    for group, (title, make) in TABLES.items():
        found = {name: section for name, section in results.items() if name.split("/")[0] == group}
        good = {name: section for name, section in found.items() if "error" not in section}
        lines += [f"## {title}", "", *(make(good) if good else ["Not measured yet."]), ""]
        lines += [f"`{name}` failed: {s['error']}\n" for name, s in found.items() if "error" in s]
    lines += ["## Where the figures come from", ""]
    rows = (
        (
            f"`{name}`",
            s["commit"],
            s["device"],
            s["driver"] or "-",
            ", ".join(" ".join(v) for v in s["versions"].items()),
        )
        for name, s in results.items()
    )
    write_text(out, "\n".join([*lines, *table("part | commit | device | driver | libraries", rows)]) + "\n")
