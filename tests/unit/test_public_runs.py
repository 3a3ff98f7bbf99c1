"""The table of runs, counted by hand: what is left of a divergence, shares of the teacher, flips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.lab.results import read
from scripts.public_runs import judged, lines, main
from src.errors import ConfigError
from src.mask import Mask

RIGHT = {"teacher": "1111110000", "cut": "1100000011", "recovered": "1111100000"}
"""The recovered model gains three documents of the cut's ten and loses two."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A judged run without a plan, named as a seed's."""
    at = tmp_path / "25-s1"
    (at / "search").mkdir(parents=True)
    Mask("any", 6, (0, 2, 3, 5), "by hand").save(at / "search/mask.json")

    def write(name: str, models: list[Any]) -> None:
        (at / f"{name}.json").write_text(json.dumps({"teacher": models[0], "models": models[1:]}))

    write("held_out", [{"kl": 0.0}, {"kl": 0.8}, {"kl": 0.2}])
    acc = [{"score": digits.count("1") / 10, "correct": digits} for digits in RIGHT.values()]
    write("tasks", [{"tasks": {"one": {"acc": each}}} for each in acc])
    return at


def test_a_run_is_told_as_counted_by_hand(run: Path) -> None:
    found = judged(run)
    assert found["removed"] == [1, 4]
    assert found["share"] == {"cut": pytest.approx(4 / 6), "recovered": pytest.approx(5 / 6)}
    assert found["tasks"]["one"] == {"cut": 0.4, "recovered": 0.5, "lost": 2, "gained": 3, "p": 1.0}
    assert found["stages"] == {}, "without a plan"
    head, _, row, *_ = lines({"runs": [found], "command": "it"})
    cells = dict(zip(*([cell.strip() for cell in line.split("|")] for line in (head, row)), strict=True))
    assert cells["held-out KL"] == "0.8000 to 0.2000  (0.250x)"
    assert cells["WikiText KL"] == "-", "not measured"
    assert cells["tasks, of the parent's"] == "66.7% to 83.3%"
    assert cells["one"] == "0.400 to 0.500  (p = 1)"


def test_a_run_that_is_not_judged_is_told_and_nothing_is_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["public_runs", "--public", str(tmp_path), "--runs", run.name]
    monkeypatch.setattr("sys.argv", [*asked, "25-s2"])
    with pytest.raises(ConfigError, match=r"--runs: no tasks.json of 25-s2; make public-seeds"):
        main()
    assert not Path("results").exists()
    monkeypatch.setattr("sys.argv", asked)
    main()
    assert [each["run"] for each in read("public_runs")["runs"]] == ["25-s1"]
