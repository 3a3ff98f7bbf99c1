"""Note in the config of an export what was cut, and from which parent; earlier cuts stay noted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from src.mask import Mask

DEPTH, WIDTH = "depth_pruning", "width_pruning"
"""Keys of the config: the last cut of each kind, with the one of its kind before it as ``before``."""


def public_name(model: str) -> str:
    """Return the Hub id, or the name of a local directory without the path to it."""
    return Path(model).name if Path(model).exists() else model


def note_cut(config: PretrainedConfig, mask: Mask) -> None:
    """Add a cut to the config of the cut model, beside what its parent's config says of earlier ones.

    Args:
        config: of the cut model; changed in place.
        mask: names the parent and the kept units.
    """
    key = WIDTH if mask.wide else DEPTH
    before = getattr(config, key, None)
    kept = {"unit": mask.unit, "removed": mask.missing} if mask.wide else {"keep": mask.kept}
    note: dict[str, Any] = {"parent": public_name(mask.model), "revision": mask.revision, **kept}
    setattr(config, key, {**note, "before": before} if before else note)


def earlier_cuts(config: PretrainedConfig) -> list[str]:
    """Return the cuts that a config notes, in words: those of layers or halves, then those of width."""
    told: list[str] = []
    for key in (DEPTH, WIDTH):
        notes, note = [], getattr(config, key, None)
        while isinstance(note, dict):
            notes.append(f"from `{note.get('parent')}`: {_words(note)}")
            note = note.get("before")
        told += reversed(notes)
    return told


def _words(note: dict[str, Any]) -> str:
    if "removed" in note:
        return f"removed {note['removed']}"
    kept = note.get("keep")
    layers = kept.get("attention") if isinstance(kept, dict) else kept
    return f"{len(layers or ())} layers kept"
