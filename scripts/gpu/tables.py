"""One table for each group of parts, as lines of Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Section = dict[str, Any]
MIB, GIB = 2**20, 2**30


def table(head: str, rows: Iterable[Iterable[object]]) -> list[str]:
    """Lines of a Markdown table; ``head`` separates its columns by ``|``."""
    names = [name.strip() for name in head.split("|")]
    cells = [[str(cell).replace("|", "/") for cell in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in (names, ["---"] * len(names), *cells)]


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
    return [
        "Bits of logits and generated tokens in bf16: plain, left-padded, generated with and without the "
        "cache. Differences are shares of the largest logit; padding and cache compare two ways of one "
        f"model, and the export gate accepts {section['tolerance']:g} there.",
        "",
        *table(
            "model | runs repeat | open = teacher | hard = cut | largest difference | left padding | cache | "
            "gradient repeats | the same without autograd in closed layers | gradient against float32", rows,
        ),
        "",
        f"Export gate in bf16 on the device: {said}.",
    ]  # fmt: skip


def search_step(found: dict[str, Section]) -> list[str]:
    section = found["search_step"]
    rows = (
        (row["dtype"], row["variant"], f"{1000 * row['seconds']:,.0f} ms", f"{row['speedup']:.2f}",
         f"{row['gradient_error']:.1e}")
        for row in section["rows"]
    )  # fmt: skip
    keys = ("layers", "hidden", "vocabulary", "rows", "tokens", "draws", "remove")
    sizes = ", ".join(f"{key} {section['settings'][key]:,}" for key in keys)
    head = "weights | variant | step | times the naive step's speed | gradient differs by"
    return [f"Sizes: {sizes}.", "", *table(head, rows)]


def loss(found: dict[str, Section]) -> list[str]:
    section = found["loss"]

    def cells(row: Section, form: str) -> list[str]:
        seconds = row[form].get("gpu_seconds", row[form].get("cpu_seconds"))
        return [f"{row[form]['peak_bytes'] / MIB:,.0f} MiB", f"{1000 * seconds:,.1f} ms"]

    rows = (
        (f"{row['vocabulary']:,}", *cells(row, "whole"), *cells(row, "chunked"), f"{row['memory_ratio']:.1f}",
         f"{row['gradient_error']:.1e}")
        for row in section["rows"]
    )  # fmt: skip
    head = "vocabulary | whole: peak | time | chunked: peak | time | times less memory | gradients differ by"
    return [f"{section['tokens']:,} tokens of {section['hidden']:,}, float32.", "", *table(head, rows)]


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
    head = (
        f"batch | phase | tokens/s, {long} layers | {short} layers | speed-up | quartiles | ideal | of ideal"
    )
    return [
        f"{section['model']}, random weights, bf16, {section['attention']}; {section['prompt_tokens']} "
        f"tokens read, {section['new_tokens']} decoded, {section['repeats']} repeats.", "",
        *table(head, rows),
    ]  # fmt: skip


def stages(found: dict[str, Section]) -> list[str]:
    rows, notes = [], {}
    for name, section in found.items():
        for row in section.get("rows", []):
            notes[section["model"]] = (
                f"{section['model']}: {section['batch_size']} rows of {section['row_tokens']} tokens; "
                f"recovery of `{section['scope']}` in {section['recovery_dtype']} ({section['why']})."
            )
            told = row.get("error") or row.get("refused")
            speed_told = f"{row['tokens_per_s']:,.0f}" if row.get("tokens_per_s") else "-"
            peak = f"{row['peak_bytes'] / GIB:.1f}" if "peak_bytes" in row else "-"
            word = ("refused: " if "refused" in row else "failed: ") if told else f"{row['steps']} steps"
            rows.append(
                (section["model"], name.split("/")[2], row["stage"], speed_told, peak, f"{word}{told or ''}")
            )
    return [*notes.values(), "", *table("model | variant | stage | tokens/s | peak, GiB | note", rows)]


def planner(found: dict[str, Section]) -> list[str]:
    section = found["planner"]

    def cells(row: Section) -> list[str]:
        if "error" in row:
            return ["-"] * 3 + [row["error"]]
        used = row["used_bytes"]
        ratio = f"{row['planned_tensors'] / row['peak_bytes']:.2f}"
        total = f"{row['planned_total'] / GIB:.2f} / {used / GIB:.2f}" if used else "-"
        speed_told = f"{row['planned_tokens_per_s']:,.0f} / {row['tokens_per_s'] or 0:,.0f}"
        return [f"{row['planned_tensors'] / GIB:.2f}", ratio, total, speed_told]

    rows = (
        (row["model"], row["variant"], row["stage"], f"{row['peak_bytes'] / GIB:.2f}", *cells(row))
        for row in section["rows"]
    )
    head = "model | variant | stage | measured peak, GiB | planned | planned / measured"
    head += " | with overhead: planned / used, GiB | tokens/s: planned / measured"
    return [f"Planned for `{section['planned_for']}` of configs/devices.json.", "", *table(head, rows)]


def headline(found: dict[str, Section]) -> list[str]:
    lines, teacher = [], found.get("headline/teacher", {})
    if "tokens" in teacher:
        lines = [
            f"The teacher: {teacher['layers']} layers, trained on {teacher['tokens']:,} tokens in "
            f"{teacher['seconds']:,} s, exact match {teacher['exact_match']:.1%} of "
            f"{teacher['problems']:,} problems.",
            "",
        ]
    rows = [
        (s["seed"], len(s["removed"]), f"{s['tokens']:,}", f"{s['share']:.2%}",
         f"{s['exact_match']['teacher']:.1%}", f"{s['exact_match']['cut']:.1%}",
         f"**{s['exact_match']['recovered']:.1%}**", f"{s['seconds']:,.0f} s")
        for s in found.values()
        if "share" in s
    ]  # fmt: skip
    head = "seed | removed | tokens spent | of the teacher's | teacher | cut | recovered | search + recovery"
    return lines + (table(head, rows) if rows else [])
