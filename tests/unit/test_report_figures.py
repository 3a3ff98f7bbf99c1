"""The figures of a report show the numbers that they are given: bars, lines, boxes and maps are read back."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from src.evaluate.flips import difference
from src.mask import Mask
from src.report import figures, tasks
from src.report.figures import AMBER, SLATE, TEAL
from src.units.alternating import Alternating

NAMES = ["teacher", "cut", "recovered", "runs/other"]


def heights(axis: Axes) -> list[float]:
    return [float(bar.get_height()) for bar in axis.patches]


def widths(axis: Axes) -> list[float]:
    return [float(bar.get_width()) for bar in axis.patches]


def words(axis: Axes) -> list[str]:
    return [text.get_text() for text in axis.texts]


def test_bars_of_quality_are_as_high_as_the_figures_in_the_models_colours() -> None:
    models = [{"exact_match": 1 - n / 10, "agreement": 1.0, "kl": n / 8} for n in range(4)]
    drawn = figures.quality(NAMES, models, ["exact_match", "kl"])
    for axis, key in zip(drawn.axes, ("exact_match", "kl"), strict=True):
        assert heights(axis) == [model[key] for model in models]
        assert axis.get_ylim()[1] > max(heights(axis))
        shades = [to_hex(bar.get_facecolor()) for bar in axis.patches]
        assert shades[:3] == [SLATE, AMBER, TEAL]
        assert shades[3] not in shades[:3]
    assert words(drawn.axes[1]) == ["0.000", "0.125", "0.250", "0.375"]


def test_colours_follow_names_and_not_places() -> None:
    plain, turned = figures.colours(NAMES), figures.colours(NAMES[::-1])
    assert plain == turned[::-1]
    others = figures.colours([f"m{n}" for n in range(9)])
    assert len(set(others[:4])) == 4
    assert not {*others} & {SLATE, AMBER, TEAL}


@pytest.mark.parametrize("removed", [(), (0,), (2, 5), (0, 1, 2, 3, 4, 5)])
def test_a_strip_has_a_box_for_each_layer_dashed_where_it_is_gone(removed: tuple[int, ...]) -> None:
    (axis,) = figures.layer_strip(7, removed).axes
    gone = [to_hex(box.get_edgecolor()) == AMBER for box in axis.patches]
    assert gone == [layer in removed for layer in range(7)]
    assert [to_hex(box.get_facecolor()) == "#ffffff" for box in axis.patches] == gone
    assert words(axis) == [str(layer) for layer in range(7)]
    assert f"{7 - len(removed)} kept (filled), {len(removed)} removed" in axis.get_title(loc="left")


@pytest.mark.parametrize("keep", list(Alternating(8, 4))[::7])
def test_a_line_joins_the_halves_of_each_new_layer(keep: tuple[int, ...]) -> None:
    mask = Mask("m", 4, keep, "x", unit="half")
    (axis,) = figures.mask_strip(mask).axes
    joined = [tuple(float(x) - 0.5 for x in line.get_xdata()) for line in axis.lines]
    assert joined == list(zip(mask.attention, mask.feed_forward, strict=True))
    thick = [line.get_linewidth() > 2 for line in axis.lines]
    assert thick == [above != below for above, below in joined]
    gone = [to_hex(box.get_edgecolor()) == AMBER for box in axis.patches]
    assert gone == [i not in kept for kept in (mask.attention, mask.feed_forward) for i in range(4)]


def test_a_map_of_width_is_the_mask() -> None:
    for one, other in combinations(combinations(range(3), 2), 2):
        keep = (*one, *(3 + unit for unit in other))
        (axis,) = figures.mask_strip(Mask("m", 2, keep, "x", unit="channel", width=3)).axes
        shown = np.asarray(axis.images[0].get_array())
        assert [tuple(np.flatnonzero(column)) for column in shown.T] == [one, other]
        assert "keeps 2 of 3 channels" in axis.get_title(loc="left")


def test_the_gate_map_has_steps_to_the_right_and_layers_upwards() -> None:
    keep_SL = [[0.1 * step, 0.5, 1.0] for step in range(5)]
    axis, *_ = figures.gate_map(keep_SL, "of something").axes
    assert np.asarray(axis.images[0].get_array()).T.tolist() == keep_SL
    assert [*axis.images[0].get_extent()] == [0, 5, -0.5, 2.5]
    assert axis.get_title(loc="left") == "Search: probability of something"


def test_speeds_stand_beside_their_ideals_and_quartiles() -> None:
    def measured(up: float, ideal: float) -> dict[str, Any]:
        each = {"speedup": up, "ideal": ideal, "speedup_iqr": [up - 0.1, up + 0.2]}
        return {"prefill": each, "decode": {**each, "speedup": up + 0.5, "speedup_iqr": [up, up + 1]}}

    drawn = figures.speed(["cut", "recovered"], [measured(1.2, 1.3), measured(1.1, 1.4)])
    prefill, decode = drawn.axes
    assert widths(prefill) == [1.2, 1.1]
    assert widths(decode) == pytest.approx([1.7, 1.6])
    for axis in (prefill, decode):
        upright = [line.get_xdata() for line in axis.lines if len(set(line.get_xdata())) == 1]
        assert [float(x[0]) for x in upright if len(x) == 2][:2] == [1.3, 1.4]
        assert axis.yaxis_inverted(), "the first name on top"
    ends = [segment[:, 0].tolist() for segment in prefill.collections[0].get_segments()]
    assert ends == [pytest.approx([1.1, 1.4]), pytest.approx([1.0, 1.3])]
    assert prefill.get_xlim()[1] > 2.2, "the longest error bar of either panel"


def test_costs_are_bars_of_tokens_and_of_seconds_and_an_empty_panel_is_none() -> None:
    tokens, seconds = {"teacher's training": 4e6, "search": 2e4}, {"search": 30.0, "recover": 90.0}
    both, one = figures.cost(tokens, seconds), figures.cost({}, seconds)
    assert [widths(axis) for axis in both.axes] == [[4e6, 2e4], [30.0, 90.0]]
    assert words(both.axes[0]) == ["4 M", "20 k"]
    assert to_hex(both.axes[0].patches[0].get_facecolor()) == SLATE
    assert [axis.get_title(loc="left") for axis in one.axes] == ["Seconds"]


@pytest.mark.parametrize("count", [1, 2, 19, 40, 100])
def test_a_smoothed_course_is_a_running_mean_on_its_own_steps(count: int) -> None:
    history = [(3 * n + 1, float(n)) for n in range(count)]
    (axis,) = figures.courses(history, []).axes
    raw, smooth = (np.array(line.get_xydata()) for line in axis.lines)
    assert raw.tolist() == [list(point) for point in history]
    window = max(1, count // 20)
    assert len(smooth) == count - window + 1
    shift = smooth[:, 1] - (smooth[:, 0] - 1) / 3  # of a straight line the mean lies in the middle
    assert np.abs(shift).max() <= 0.5 + 1e-9


def test_tasks_are_groups_of_bars_about_which_the_difference_from_the_teacher_is_drawn() -> None:
    def model(name: str, score: float, **more: Any) -> dict[str, Any]:
        right = {"score": score, "correct": "0110", **more}
        each = {"acc": right, "perplexity": {"score": 9.0}}
        return {"name": name, "tasks": {"a": each, "b": {"perplexity": {"score": 8.0}, "acc": right}}}

    models = [model("teacher", 0.75), model("recovered", 0.5, flips={"lost": 2, "gained": 1, "p": 1.0})]
    assert tasks.judged(models) == [("a", "acc"), ("b", "acc")]
    assert tasks.judged([*models, {"name": "c"}]) == []
    (axis,) = tasks.bars(models).axes
    assert heights(axis) == [0.75, 0.75, 0.5, 0.5]
    shades = [to_hex(bar.get_facecolor()) for bar in axis.patches]
    assert shades == [SLATE, SLATE, TEAL, TEAL]
    middle = [bar.get_x() + bar.get_width() / 2 for bar in axis.patches[2:]]
    assert [line.get_xdata()[0] for line in axis.lines] == pytest.approx(middle), "of students alone"
    change = difference({"lost": 2, "gained": 1}, 4)
    ends = [max(0.0, 0.75 + change["low"]), 0.75 + change["high"]]  # the teacher's score and the difference
    assert [[*line.get_ydata()] for line in axis.lines] == [pytest.approx(ends)] * 2
    assert words(axis) == ["0.75", "0.75", "0.50", "0.50"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["a, acc", "b, acc"]
    for each in models:
        each["tasks"] = {f"t{n}": each["tasks"]["a"] for n in range(12)}
    (axis,) = tasks.bars(models).axes
    assert (len(heights(axis)), "the first 8 of 12" in axis.get_title(loc="left")) == (16, True)


def test_budgets_are_points_with_their_values() -> None:
    curve = [{"removed": 1, "kl": 0.001}, {"removed": 3, "kl": 0.5}]
    (axis,) = figures.budgets(curve, 6).axes
    assert np.array(axis.lines[0].get_xydata()).tolist() == [[1, 0.001], [3, 0.5]]
    assert words(axis) == ["0.0010", "0.5000"]
    assert axis.get_yscale() == "log"
    near = figures.budgets([{"removed": 1, "kl": 0.1}, {"removed": 3, "kl": 0.5}], 6)
    assert near.axes[0].get_yscale() == "linear"


def test_drawing_changes_no_setting_for_others_and_names_are_no_formulas() -> None:
    before = dict(rcParams)
    drawn = figures.quality(["$x^2$", "a" * 60], [{"kl": 1.0}, {"kl": 2.0}], ["kl"])
    assert "$x^2$" in figures.svg(drawn)
    assert dict(rcParams) == before
    labels = [label.get_text() for label in drawn.axes[0].get_xticklabels()]
    assert labels == ["$x^2$", "..." + "a" * 21]
