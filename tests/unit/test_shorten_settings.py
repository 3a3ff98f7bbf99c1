"""What is learned of the parent in the one command's recovery."""

from __future__ import annotations

import pytest

from src.models.loading import load_config
from src.shorten import settings
from src.shorten.text import Text
from tests.unit.test_shorten import chosen


def test_all_tokens_of_the_parent_are_learned_where_they_fit(
    monkeypatch: pytest.MonkeyPatch, teacher_dir: str
) -> None:
    """A step's rows times their length times the vocabulary, in float32."""
    found = chosen(teacher_dir, text := Text(100, 10_000, 100, False))
    rows, length = (found["recover", name].value for name in ("batch_size", "max_length"))
    held = 4 * rows * length * load_config(teacher_dir).vocab_size
    assert found["recover", "k"].value == "null"
    for room, fits in ((held, True), (held - 1, False)):
        monkeypatch.setattr(settings, "HELD", room)
        assert (("recover", "k") in chosen(teacher_dir, text)) == fits
