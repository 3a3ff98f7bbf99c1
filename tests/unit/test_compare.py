"""Runs side by side: equal runs differ in nothing, the order changes only the order, nothing is made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from src.data.judging import content, read_rows
from src.errors import ConfigError
from src.files import read_json, write_json
from src.mask import Mask
from src.report import compare as verb
from src.report.compare import tables
from src.report.run_files import RunFiles
from tests.pages import Cells

ROWS = torch.tensor([[5, 10], [7, 20], [9, 40]])
CALLBACK = "src.callbacks.HardenMask"


def config(stage: str, **model: Any) -> dict[str, Any]:
    """The settings of a stage, as a run writes them."""
    return {
        "seed_everything": 0,
        "trainer": {
            "max_steps": 5,
            "logger": {"class_path": "L", "init_args": {"save_dir": str(model)}},
            "callbacks": [{"class_path": CALLBACK, "init_args": {"path": None}}],
        },
        "model": {"class_path": f"src.{stage}.Stage", "init_args": {"draws": 4, **model}},
        "data": {"class_path": "src.data.Corpus", "init_args": {"batch_size": 2}},
        "accept": str(model),
        "ckpt_path": str(model),
    }


def stage(folder: Path, name: str, tokens: int, rows: torch.Tensor = ROWS, **model: Any) -> None:
    """What a stage leaves."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config(name, **model)))
    record = {"tokens": tokens, "seconds": tokens / 10, "steps": 5, "commit": "abc", "history": []}
    write_json(folder / "record.json", record)
    save_file({"rows": rows}, folder / "record.rows.safetensors")


def judgement(folder: Path, correct: str, about: str = "rows", **figures: Any) -> None:
    score = correct.count("1") / len(correct)
    teacher = {"path": "teacher", "layers": 6, "parameters": 600, "exact_match": 1.0}
    teacher["correct"] = "1" * len(correct)
    own = {"path": str(folder / "model"), "layers": 4, "parameters": 400, "exact_match": score}
    judged = own | {"correct": correct} | figures
    write_json(folder / "evaluate.json", {"teacher": teacher, "models": [judged], "content": about})


def whole(folder: Path, keep: tuple[int, ...], correct: str, **model: Any) -> Path:
    """A whole run: a search, a recovery that reads one row of the search's again, a judgement."""
    stage(folder / "search", "search", 100, ROWS[:2], **model)
    stage(folder / "recover", "recover", 1000, ROWS[1:])
    Mask("parent", 6, keep, "Random", metrics={"kl": 0.25}).save(folder / "search" / "mask.json")
    judgement(folder, correct, kl=0.5)
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two whole runs and one that was stopped in its search."""
    one = whole(tmp_path / "one", (0, 1, 4, 5), "1101")
    two = whole(tmp_path / "two", (0, 1, 2, 4), "0111", draws=8)
    stage(tmp_path / "three", "search", 50, draws=8)
    return [one, two, tmp_path / "three"]


def compared(*runs: Path) -> dict[str, Any]:
    return verb.compare([RunFiles.read(run.name, run) for run in runs])


def test_a_run_is_equal_to_itself(runs: list[Path]) -> None:
    found = verb.compare([RunFiles.read("a", runs[0]), RunFiles.read("b", runs[0])])
    assert found["settings"] == {}
    assert found["pairs"] == [
        {"runs": ["a", "b"], "removed_by_both": 2, "removed_by_either": 2, "lost": 0, "gained": 0, "p": 1.0}
    ]
    first, second = ({**run, "name": ""} for run in found["runs"])
    assert first == second


def test_the_order_of_runs_is_the_order_of_columns_and_turns_flips_around(runs: list[Path]) -> None:
    there, back = compared(*runs[:2]), compared(*runs[1::-1])
    assert there["runs"] == back["runs"][::-1]
    assert there["settings"] == back["settings"] == {"search: model.init_args.draws": {"one": 4, "two": 8}}
    (one,), (other,) = there["pairs"], back["pairs"]
    assert (one["removed_by_both"], one["removed_by_either"]) == (1, 3) == (
        other["removed_by_both"], other["removed_by_either"]
    )  # fmt: skip
    assert (
        (one["lost"], one["gained"], one["p"]) == (other["gained"], other["lost"], other["p"]) == (1, 1, 1.0)
    )
    rows, turned = tables(there), tables(back)
    for table, other_way in zip(rows[:2], turned[:2], strict=True):
        assert [[a, c, b] for a, b, c in table] == other_way


def test_what_runs_cost_is_the_sum_of_their_stages_and_a_row_read_twice_is_one(runs: list[Path]) -> None:
    one, _, three = compared(*runs)["runs"]
    assert (one["tokens"], one["seconds"], one["steps"], one["distinct_tokens"]) == (1100, 110.0, 10, 70)
    assert (three["tokens"], three["seconds"], three["distinct_tokens"]) == (50, 5.0, 70)
    assert (one["exact_match"], one["kl"], one["mask_kl"], one["removed"]) == (0.75, 0.5, 0.25, "[2, 3]")
    assert not {"exact_match", "kl", "mask_kl", "removed"} & set(three)


def test_divergences_are_compared_row_by_row(runs: list[Path]) -> None:
    """What all rows share does not blur a difference: it is exact where each row differs by the same."""
    tokens, shared = np.array([10.0, 20.0, 30.0, 40.0]), np.array([1.0, 90.0, 3.0, 400.0])
    for run, more in zip(runs[:2], (0.0, 0.25), strict=True):
        told = read_json(run / "evaluate.json")
        told["models"][-1] |= {"row_kl": [*(shared + more * tokens)], "row_tokens": [*tokens]}
        write_json(run / "evaluate.json", told)
    found = compared(*runs)
    assert found["pairs"][0]["kl"] == pytest.approx({"value": 0.25, "low": 0.25, "high": 0.25})
    cells = {row[0]: row[1:] for row in tables(found)[0]}
    assert cells["KL, less that of one"] == ["-", "+0.2500 [0.2500, 0.2500]", "-"]
    assert compared(*runs[1::-1])["pairs"][0]["kl"]["value"] == -found["pairs"][0]["kl"]["value"]
    other = {"dtype": "bfloat16"}, {"teacher": told["teacher"] | {"loss": 9.0}}, {"content": "other rows"}
    for differs in other:
        write_json(runs[1] / "evaluate.json", told | differs)
        assert "kl" not in compared(*runs)["pairs"][0]


def test_what_a_run_does_not_have_is_a_dash(runs: list[Path]) -> None:
    scores, settings, pairs = tables(compared(*runs))
    cells = {row[0]: row[1:] for row in [*scores, *settings]}
    assert cells[""] == cells["setting"] == ["one", "two", "three"]
    assert cells["exact match"] == ["75.0%", "75.0%", "-"]
    assert cells["tokens processed"] == ["1.1 k", "1.1 k", "50"]
    assert cells["removed"] == ["[2, 3]", "[3, 5]", "-"]
    assert cells["search: model.init_args.draws"] == ["4", "8", "8"]
    assert [row[:2] for row in pairs[1:]] == [["two", "one"], ["three", "one"], ["three", "two"]]
    assert [row[2:] for row in pairs[1:]] == [["1 / 3", "1 / 1  (p = 1)"], ["-", "-"], ["-", "-"]]


def test_many_runs_are_rows_with_the_cells_that_few_have_as_columns(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    figures, settings, _ = few = tables(compared(*runs))
    scores, chosen = ([list(column) for column in zip(*table, strict=True)] for table in verb.turned(few))
    assert scores[0] == chosen[0] == ["", "one", "two", "three"]
    columns = [*scores, *chosen[1:]]
    shown = [figures[0], *(row for row in figures[1:] if len(set(row[1:])) > 1), *settings[1:]]
    assert [column[1:] for column in columns] == [row[1:] for row in shown]
    assert "search: model draws" in [column[0] for column in columns]
    verb.main([str(runs[0])] * (verb.MANY + 1))
    assert "against" not in capsys.readouterr().out, "21 pairs"


def test_held_out_metrics_are_the_later_stages(runs: list[Path]) -> None:
    noted = {"search": {"val/kl": 3.0, "val/a": 1.0}, "recover": {"val/kl": 2.0, "train/x": 5}}
    for name, values in noted.items():
        file = runs[0] / name / "record.json"
        write_json(file, json.loads(file.read_text()) | {"metrics": values})
    found = compared(*runs[:2])
    assert found["runs"][0]["validation"] == {"val/kl": 2.0, "val/a": 1.0}
    cells = {row[0]: row[1:] for row in tables(found)[0]}
    assert (cells["val/kl"], cells["val/a"], "train/x" in cells) == (["2.0000", "-"], ["1.0000", "-"], False)


def test_the_cut_stands_beside_what_its_recovery_made_of_it(runs: list[Path]) -> None:
    """Its divergence is that of the same judgement; the search's cost is what its mask says."""
    file = runs[0] / "evaluate.json"
    judged = json.loads(file.read_text())
    cut = {"path": str(runs[0] / "cut"), "layers": 4, "parameters": 400}
    write_json(file, judged | {"models": [cut | {"kl": 2.0, "kl_interval": [1.5, 2.5]}, *judged["models"]]})
    mask = Mask("parent", 6, (0, 1, 2, 4), "Random", metrics={"kl": 0.25, "forward_tokens": 12_000})
    mask.save(runs[1] / "search" / "mask.json")
    cells = {row[0]: row[1:] for row in tables(compared(*runs))[0]}
    assert cells["held-out KL of the cut, nats"] == ["2.0000 [1.5000, 2.5000]", "-", "-"]
    assert cells["held-out KL, nats"] == ["0.5000", "0.5000", "-"]
    assert cells["search, forward tokens"] == ["-", "12 k", "-"]


def test_items_of_other_rows_and_units_of_other_kinds_are_not_compared(runs: list[Path]) -> None:
    for about in ("others", None):
        judgement(runs[1], "0111", about)
        assert not {"lost", "gained", "p"} & set(compared(*runs[:2])["pairs"][0])
    judgement(runs[0], "1101", None)
    assert "lost" not in compared(*runs[:2])["pairs"][0], (
        "that neither notes its rows does not make them equal"
    )
    Mask("parent", 6, (0, 1, 4, 5), "Random", unit="half").save(runs[1] / "search" / "mask.json")
    assert "removed_by_both" not in compared(*runs[:2])["pairs"][0]


def test_a_single_stage_is_compared_by_its_name_and_a_recovery_has_its_searchs_mask(runs: list[Path]) -> None:
    search, whole = RunFiles.read("a", runs[0] / "search"), RunFiles.read("b", runs[0])
    assert search.settings == {k: v for k, v in whole.settings.items() if k.startswith("search: ")}
    assert search.mask == whole.mask
    stage(runs[0] / "recover", "recover", 1000, mask=str(runs[1] / "search" / "mask.json"))
    alone = RunFiles.read("c", runs[0] / "recover")
    assert alone.mask == RunFiles.read("d", runs[1]).mask
    assert RunFiles.read("b", runs[0]).mask == whole.mask, "a run's own mask comes first"


def test_a_recovery_that_was_moved_has_the_mask_that_it_recovered(runs: list[Path]) -> None:
    """By its own copy, though another mask lies now where its settings say."""
    there, kept = runs[0] / "search" / "mask.json", runs[0] / "recover" / "recovers.json"
    stage(runs[0] / "recover", "recover", 1000, mask=str(there))
    mask = Mask.load(there)
    mask.save(kept)
    Mask("parent", 6, (0, 1, 2, 4), "Random").save(there)
    moved = (runs[0] / "recover").rename(runs[0].parent / "moved")
    assert RunFiles.read("a", moved).mask == mask
    assert RunFiles.read("b", runs[0]).mask == Mask.load(there), "a search's own mask comes first"


def test_screen_page_and_json_say_the_same(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, plain = tmp_path / "page.html", tmp_path / "new" / "plain.json"
    verb.main([*map(str, runs), "--html", str(page), "--json", str(plain)])
    found, screen = json.loads(plain.read_text()), capsys.readouterr().out
    assert {key: found[key] for key in ("runs", "settings", "pairs")} == json.loads(
        json.dumps(compared(*runs))
    )
    cells = Cells()
    cells.feed(page.read_text())
    assert cells.cells == [cell for table in tables(found) for row in table for cell in row]
    assert all(cell in screen for cell in cells.cells)
    assert page.read_text().count("<img") == 2, "the masks that there are"


@pytest.mark.parametrize("broken", ["no", "empty", "search/config.yaml", "search/mask.json", "evaluate.json"])
@pytest.mark.parametrize("text", ['{"models": [{"odd": ', '{"odd": 1}'])
def test_what_is_no_run_is_one_message_and_nothing_is_written(
    broken: str, text: str, runs: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    other = tmp_path / "two" if "." in broken else tmp_path / broken
    if broken == "empty":
        other.mkdir()
    if "." in broken:
        (other / broken).write_text(text)
    with pytest.raises(ConfigError) as fault:
        verb.main([str(runs[0]), str(other), "--json", str(out)])
    assert str(other) in str(fault.value)
    assert "\n" not in str(fault.value)
    assert not out.exists()


def test_one_run_alone_or_one_file_for_two_is_refused(runs: list[Path], tmp_path: Path) -> None:
    file = str(tmp_path / "file")
    for more, told in (([], "two or more"), ([str(runs[1]), "--json", file, "--html", file], "of its own")):
        with pytest.raises(ConfigError, match=told):
            verb.main([str(runs[0]), *more])
    assert not Path(file).exists()


def test_rows_are_known_by_what_they_hold(tmp_path: Path) -> None:
    rows = [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]
    turned, digests = [dict(reversed(row.items())) for row in rows], []
    for name, kept in (("x", rows), ("y", turned), ("z", rows[::-1]), ("w", rows[:1])):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in kept))
        digests.append(content(read_rows(str(file))))
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
