"""The command that prunes and merges tokens: its data, its training, its figures, its faults, its page."""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scripts.lab.pages import made, table
from scripts.lab.results import read
from src.vision import verb
from src.vision.digits import COLUMNS, Digits, classifier, digits, distilled, speed, train
from src.vision.picture import picture
from src.vision.tokens import CENTRE, MERGED, PRUNED, compress, merging
from tests.blocks import run_by
from tests.faults.runs import ended

HERE = "tests/integration/test_vision.py"
TINY = ["--epochs", "1", "--tuning", "1", "--seeds", "0", "1", "--repeats", "2"]


def drawn(count: int) -> Digits:
    """Images that show their digit by the brightness of one patch."""
    labels = torch.arange(count) % 10
    images = 0.1 * torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(count))
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = divmod(label, COLUMNS)
        image[0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = 1.0
    return Digits(images, labels)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command reads a few drawn digits in place of scikit-learn's."""
    monkeypatch.setattr(verb, "digits", lambda: (drawn(60), drawn(20)))


# ---------------------------------------------------------------------- data and training


def test_every_image_is_read_once_with_its_own_label(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    number = np.arange(1797.0)
    loaded = SimpleNamespace(images=number[:, None, None] * np.ones((8, 8)), target=np.arange(1797) % 10)
    monkeypatch.setitem(sys.modules, "sklearn", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "sklearn.datasets", SimpleNamespace(load_digits=lambda: loaded))
    data, held_out = digits()
    assert (len(data.labels), len(held_out.labels)) == (1297, 500)
    shown = torch.cat([data.images, held_out.images])[:, 0, 0, 0] * 16
    assert torch.equal(shown.sort().values, torch.arange(1797.0))
    assert torch.equal(torch.cat([data.labels, held_out.labels]), (shown % 10).long())
    assert torch.equal(digits()[1].images, held_out.images), "the same every time"
    assert sum(len(labels) for _, labels in data.batches()) == 1297


@pytest.mark.slow
def test_the_digits_of_scikit_learn() -> None:
    pytest.importorskip("sklearn", reason="needs the extra vision")
    data, held_out = digits()
    assert data.images.shape == (1297, 1, 8, 8)
    assert (data.images.min(), data.images.max()) == (0, 1)
    assert held_out.labels.bincount().min() > 30


def test_training_is_the_seeds_alone_and_none_changes_nothing() -> None:
    data = drawn(70)
    one, same, other = (train(classifier(seed), data, 1, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert any(not torch.equal(value, other[name]) for name, value in one.items())
    untrained = train(classifier(0), data, 0, 0).state_dict()
    assert all(torch.equal(value, untrained[name]) for name, value in classifier(0).state_dict().items())


def test_a_teacher_pulls_towards_itself_and_equals_are_at_rest() -> None:
    teacher, images = classifier(0), drawn(10).images
    logits = teacher(images).logits.detach().requires_grad_()
    loss = distilled(logits, teacher, images)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(gradient, torch.zeros(10, 10), atol=1e-6, rtol=0)
    away = (teacher(images).logits.detach() + torch.randn(10, 10)).requires_grad_()
    (gradient,) = torch.autograd.grad(distilled(away, teacher, images), away)
    nearer = away - gradient / gradient.norm()
    assert distilled(nearer, teacher, images) < distilled(away, teacher, images)


def test_the_operations_are_those_by_hand() -> None:
    """Of a block: 24 T H^2 and 4 T^2 H; of the matrices around it: 4 C T H."""
    part_P = torch.tensor([CENTRE] * 9 + [MERGED] * 4 + [PRUNED] * 3)
    model, images = classifier(0), drawn(5).images
    short = compress(deepcopy(model), {2: merging(part_P, torch.ones(16), COLUMNS)})
    ms, (whole, less) = speed([model, short], images, 3)
    tokens, own, width = 17, 10, 48

    def block(count: int) -> int:
        return 24 * count * width**2 + 4 * count**2 * width

    ends = 2 * 16 * 4 * width + 2 * width * 10
    assert whole == 5 * (5 * block(tokens) + ends)
    assert less == 5 * (4 * block(tokens) + block(own) + 4 * own * tokens * width + ends)
    assert ms.shape == (2, 3)
    assert (ms > 0).all()


# ---------------------------------------------------------------------- the command


def test_the_command_of_the_page_runs(
    given: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = run_by(HERE)
    (command,) = block.commands
    monkeypatch.chdir(tmp_path)
    assert ended([*command, *TINY]) == 0
    found = json.loads(Path(command[command.index("--out") + 1]).read_text())
    whole, scored, random = found["rows"]
    assert whole["tokens"] == [17.0, 17.0]
    assert scored["tokens"] == random["tokens"] == [(5 + 16 + round(0.65 * 64)) / 5] * 2
    assert scored["ideal"] == pytest.approx([1.3] * 2, abs=0.02)
    assert found["seeds"] == [0, 1]
    assert found["command"].startswith("python -m src.cli vision")
    assert "pruned and merged" in capsys.readouterr().out
    drawing = Path(command[command.index("--figure") + 1]).read_text()
    assert all(f"Block {number}: " in drawing for number in (1, 2, 3, 4))


def test_where_all_tokens_stay_nothing_is_lost(given: None, tmp_path: Path) -> None:
    out = tmp_path / "v.json"
    same = ["--prune", "0", "--keep", "1", "--tuning", "0", "--seeds", "0"]
    assert ended(["vision", *TINY, *same, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    for row in rows:
        assert row["accuracy"] == row["tuned"] == rows[0]["accuracy"]
        assert row["tokens"] == [17.0]
    assert rows[1]["ideal"][0] < 1, "matrices that merge nothing cost their products"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--prune", "0.5", "--keep", "0.7"],
            "--prune 0.5 and --keep 0.7 given; accepted: at most 1 together",
        ),
        (["--keep", "1.5"], "--keep: '1.5' given; accepted: a number from 0 to 1"),
        (["--seeds", "-1"], "--seeds"),
        (["--out", "/"], "--out: '/' given; it is a directory"),
        ([], "pip install -c constraints.txt -e '.[vision]'"),
    ],
)
def test_faults_are_one_message(
    more: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)  # as if it were not installed
    assert ended(["vision", *more]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told


# ---------------------------------------------------------------------- what is shown


def test_the_picture_has_a_frame_for_each_patch_and_an_arrow_for_each_merge() -> None:
    part_LP = torch.tensor([[CENTRE, MERGED, MERGED, PRUNED], [CENTRE, CENTRE, PRUNED, PRUNED]])
    first, second = picture(torch.rand(4, 4), part_LP, 3, 2).axes
    assert [axis.get_title(loc="left") for axis in (first, second)] == [
        "Block 3: 1 kept,\n2 merged, 1 pruned",
        "Block 4: 2 kept,\n0 merged, 2 pruned",
    ]
    assert [len(first.patches), len(second.patches)] == [4, 4]
    assert [len(first.texts), len(second.texts)] == [2, 0], "arrows"
    assert [(arrow.xyann, arrow.xy) for arrow in first.texts] == [((3, 1), (1, 1)), ((1, 3), (1, 1))]
    assert sum(bool(frame.get_hatch()) for frame in second.patches) == 2


def test_a_cell_is_the_mean_and_each_seed() -> None:
    row = {key: [1.0, 1.0] for key in verb.SHOWN} | {"model": "whole", "accuracy": [0.5, 0.75]}
    heading, (told,) = verb.HEAD.split(" | "), verb.cells({"rows": [row]})
    assert told[heading.index("accuracy, %")] == "62.5 (50.0, 75.0)"
    assert told[heading.index("times as fast")] == "1.00"


def test_the_page_shows_the_file_of_results() -> None:
    found, page = read("vision"), Path("docs/systems/prune_and_merge.md").read_text()
    shown = page.split("<!-- vision -->\n")[1].split("\n<!-- /vision -->")[0]
    assert shown.splitlines() == [*table(verb.HEAD, verb.cells(found)), "", made(found)]
