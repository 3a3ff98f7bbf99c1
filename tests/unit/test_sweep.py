"""The file of a sweep: what it says is what trials are given, and what none could run is refused at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from src.errors import ConfigError
from src.mask import Mask
from src.sweep import settings, study, verb
from src.sweep.keys import Key
from src.sweep.settings import Sweep
from src.sweep.trials import figures

LR, DRAWS, FORM = (
    "model.init_args.optimizer.init_args.lr",
    "model.init_args.draws",
    "model.init_args.policy.init_args.form",
)
GIVEN: dict[str, Any] = {
    "config": "configs/search/gumbel_topk.yaml",
    "set": {"trainer.max_steps": 3, "data.init_args.validation": None},
    "keys": {
        LR: {"low": 0.01, "high": 1.0, "log": True},
        DRAWS: {"low": 2, "high": 8},
        FORM: ["softmax", "sigmoid"],
        "config": [None, "configs/unit/half.yaml"],
    },
    "metric": "kl", "direction": "minimize", "trials": 20, "seed": 0, "out": "logs/sweep/x",
}  # fmt: skip


def written(folder: Path, **changes: Any) -> str:
    """The file of a sweep, changed; None leaves a field out."""
    file = folder / "sweep.yaml"
    given = {key: value for key, value in (GIVEN | changes).items() if value is not None}
    file.write_text(yaml.safe_dump(given, sort_keys=False))
    return str(file)


class Drawn:
    """Stands where a trial is, and gives the upper ends and the last choices."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def suggest_int(self, *about: Any, log: bool) -> int:
        self.asked.append((*about, log))
        return int(about[-1])

    def suggest_float(self, *about: Any, log: bool) -> float:
        self.asked.append((*about, log))
        return float(about[-1])

    def suggest_categorical(self, name: str, choices: tuple[str, ...]) -> str:
        self.asked.append((name, choices))
        return choices[-1]


@pytest.fixture
def unparsed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines that would be parsed beforehand."""
    lines: list[list[str]] = []
    monkeypatch.setattr(settings, "parsed", lines.append)
    return lines


def test_a_trial_gets_what_the_file_says_and_its_own_values(
    tmp_path: Path, unparsed: list[list[str]]
) -> None:
    sweep = Sweep.read(written(tmp_path), ["--data.init_args.train=a b.jsonl"])
    trial: Any = Drawn()
    values = {key.name: key.draw(trial) for key in sweep.keys}
    assert trial.asked == [
        (LR, 0.01, 1.0, True), (DRAWS, 2, 8, False), (FORM, ("softmax", "sigmoid")),
        ("config", ("null", "configs/unit/half.yaml")),
    ]  # fmt: skip
    assert sweep.argv(values, sweep.place(6)) == [
        "fit", "--config", "configs/search/gumbel_topk.yaml", "--config", "configs/unit/half.yaml",
        "--data.init_args.train=a b.jsonl", "--trainer.max_steps=3", "--data.init_args.validation=null",
        f"--{LR}=1.0", f"--{DRAWS}=8", f"--{FORM}=sigmoid",
        "--trainer.logger.init_args.save_dir=logs/sweep", "--trainer.logger.init_args.name=x",
        "--trainer.logger.init_args.version=trial_7",
    ]  # fmt: skip
    told = sweep.command(values | {"config": "null"})
    assert "half" not in told
    assert "logger" not in told
    assert "'--data.init_args.train=a b.jsonl'" in told


def test_every_choice_and_both_ends_are_parsed_beforehand(tmp_path: Path, unparsed: list[list[str]]) -> None:
    sweep = Sweep.read(written(tmp_path), [])
    assert len(unparsed) == 2, "as many as the most values of a key"
    for key in sweep.keys:
        for value in key.tried:
            words = [value] if key.name == "config" else [f"--{key.name}={value}"]
            assert value == "null" or any(words[0] in line for line in unparsed), (key, value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrc": "kl"}, "there is no field 'metrc'. Did you mean 'metric'?"),
        ({"metric": None, "trials": None}, "metric, trials: not given"),
        ({"direction": "down"}, "direction: down given; accepted: minimize or maximize"),
        ({"trials": 0}, "trials: 0 given; accepted: a whole number from 1"),
        ({"trials": True}, "trials: true given"),
        ({"seed": -1}, "seed: -1 given"),
        ({"keys": {}}, "keys: {} given; accepted: keys of fit"),
        ({"config": []}, "config: [] given; accepted: a YAML file of fit"),
        ({"set": {DRAWS: 3}}, f"set: {DRAWS} given under keys too"),
        *(
            ({"keys": {DRAWS: wrong}}, f"keys: {DRAWS}: ")
            for wrong in (
                3, [], {"low": 3}, {"low": 3, "high": 3}, {"low": 5, "high": 3}, {"low": "a", "high": "b"},
                {"low": 1, "high": float("inf")}, {"low": 0, "high": 3, "log": True},
                {"low": 1, "high": 3, "lgo": True}, {"low": 1, "high": 3, "log": 1},
            )
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_message(
    changes: dict[str, Any], message: str, tmp_path: Path, unparsed: list[list[str]]
) -> None:
    with pytest.raises(ConfigError) as fault:
        Sweep.read(written(tmp_path, **changes), [])
    assert message in str(fault.value)
    assert "\n" not in str(fault.value)
    assert unparsed == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": {"model.init_args.drws": [1, 2]}}, "drws"),
        ({"keys": {DRAWS: {"low": 0, "high": 4}}}, "draws: 0 given"),
        pytest.param({"keys": {FORM: ["softmax", "softmix"]}}, "'softmix' given", marks=pytest.mark.slow),
    ],
)
def test_what_fit_refuses_is_refused_before_the_first_trial(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "check_installed", lambda: None)
    out = tmp_path / "out"
    with pytest.raises(ConfigError) as fault:
        verb.main(["--config", written(tmp_path, out=str(out), **changes)])
    assert message in str(fault.value)
    assert "\n" not in str(fault.value)
    assert not out.exists()


def test_without_optuna_it_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "optuna", None)
    with pytest.raises(ConfigError, match=r"optuna is not installed: pip install .*\[sweep\]"):
        verb.main(["--config", written(tmp_path)])


def test_figures_are_those_of_record_and_mask_and_the_last_of_each_metric(tmp_path: Path) -> None:
    assert figures(tmp_path) == {}
    text = '{"tokens": 7, "history": [[1, 2.0]], "commit": "x", "metrics": {"val/kl": 0.5}}'
    (tmp_path / "record.json").write_text(text)
    Mask("m", 4, (0, 1, 3), "x", metrics={"kl": 0.25}).save(tmp_path / "mask.json")
    assert figures(tmp_path) == {"tokens": 7, "val/kl": 0.5, "kl": 0.25}


@pytest.mark.slow
def test_the_shipped_sweeps_can_be_read() -> None:
    for file in Path("configs/sweep").glob("*.yaml"):
        assert Sweep.read(str(file), []).keys


def test_whole_numbers_are_a_matter_of_both_ends() -> None:
    trial: Any = Drawn()
    assert Key.read("a", {"low": 1, "high": 3}).draw(trial) == "3"
    assert Key.read("a", {"low": 1, "high": 3.0}).draw(trial) == "3.0"
