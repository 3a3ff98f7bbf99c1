"""Loggers: a run's figures are the same whichever are used, and each holds what the run says of itself."""

from __future__ import annotations

import csv
import json
import struct
from collections import defaultdict
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from src.mask import Mask
from src.report import loggers
from tests.faults.runs import Files, ended
from tests.integration.test_resume import same

Curves = dict[str, dict[int, float]]
"""Values by metric and step."""
EXTRAS = {"wandb": "wandb", "mlflow": "mlflow"}
INSTALLED = ["csv", "tensorboard", *(name for name, package in EXTRAS.items() if find_spec(package))]


def overlay(name: str, out: Path) -> list[str]:
    """The shipped overlay, with its files in ``out`` in place of ``logs``."""
    text = Path(f"configs/logger/{name}.yaml").read_text()
    assert "save_dir: logs" in text
    file = out / f"{name}.yaml"
    file.write_text(text.replace("save_dir: logs", f"save_dir: {out}"))
    return ["--config", str(file)]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, teacher_dir: str, corpus_file: str) -> Path:
    """A search without, and one with all loggers whose packages are installed."""
    out = tmp_path_factory.mktemp("loggers")
    files = Files(out, teacher_dir, corpus_file, "")
    short = ["--trainer.max_steps=3", "--trainer.log_every_n_steps=1"]
    assert ended(files.command("search", "plain", *short)) == 0
    added = [word for name in INSTALLED for word in overlay(name, out)]
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("WANDB_SILENT", "MLFLOW_DISABLE_TELEMETRY"):
            patch.setenv(variable, "true")
        assert ended([*files.command("search", "logged", *short), *added]) == 0
        if "wandb" in INSTALLED:  # as the end of a process does
            import_module("wandb").finish()
    return out


def of_events(folder: Path) -> tuple[Curves, EventAccumulator]:
    events = EventAccumulator(str(folder)).Reload()
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    return {tag: {point.step: point.value for point in points} for tag, points in scalars.items()}, events


def of_csv(out: Path) -> Curves:
    curves: Curves = defaultdict(dict)
    with open(out / "csv" / "version_0" / "metrics.csv") as stream:
        for row in csv.DictReader(stream):
            for tag, value in row.items():
                if tag != "step" and value:
                    curves[tag][int(row["step"])] = float(value)
    return curves


def alike(curves: Curves, others: Curves) -> None:
    """Every metric of the run's own logger, but those of its speed, is in the other at each step."""
    tags = {tag for tag in curves if tag.startswith(("train/", "mask/", "val/"))}
    assert len(tags) >= 4
    for tag in tags:
        assert others[tag] == pytest.approx(curves[tag], rel=1e-6), tag


def test_the_figures_are_those_of_a_run_without_them(out: Path) -> None:
    plain, logged = out / "search" / "plain", out / "search" / "logged"
    states = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=False) for run in (plain, logged)]
    same(*states)
    for name in ("mask.json", "gates.json"):
        assert (plain / name).read_bytes() == (logged / name).read_bytes()
    alike(of_events(plain)[0], of_events(logged)[0])


def test_the_run_stays_where_its_own_logger_puts_it(out: Path) -> None:
    assert {file.name for file in (out / "search").iterdir()} == {"plain", "logged"}
    names = [
        {f.name for f in (out / "search" / run).iterdir() if "events" not in f.name}
        for run in ("plain", "logged")
    ]
    assert names[0] == names[1]


def reading(out: Path, name: str) -> tuple[Curves, dict[str, Any]]:
    """What a logger holds: metrics, and settings by their path, as text."""
    if name == "csv":
        noted = flat(yaml.safe_load((out / "csv" / "version_0" / "hparams.yaml").read_text()))
        return of_csv(out), {key: str(value) for key, value in noted.items()}
    curves, events = of_events(out / "tensorboard" / "version_0")
    noted = HParamsPluginData.FromString(
        events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    )
    values = {
        key: getattr(value, value.WhichOneof("kind"))
        for key, value in noted.session_start_info.hparams.items()
    }
    return curves, {key: str(value) for key, value in values.items()}


def flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    return {
        key: leaf
        for name, part in value.items()
        for key, leaf in flat(part, f"{path}/{name}".strip("/")).items()
    }


@pytest.mark.parametrize("name", ["csv", "tensorboard"])
def test_each_holds_metrics_settings_and_results(name: str, out: Path) -> None:
    run = out / "search" / "logged"
    curves, settings = reading(out, name)
    alike(of_events(run)[0], curves)
    noted = flat(yaml.safe_load((run / "config.yaml").read_text()))
    assert {key for key, value in noted.items() if not isinstance(value, list)} <= settings.keys()
    assert settings["run"] == str(run)
    assert settings["model/init_args/policy/init_args/form"] == "softmax"
    assert settings["model/init_args/optimizer/init_args/lr"] == "0.1"
    assert settings["trainer/max_steps"] in ("3", "3.0")
    results(run, curves)


def results(run: Path, curves: Curves) -> None:
    """The final figures are those of the run's files."""
    record, mask = json.loads((run / "record.json").read_text()), Mask.load(run / "mask.json")
    wanted = {
        **{key: record[key] for key in ("tokens", "distinct_tokens", "seconds", "steps")},
        **mask.metrics,
    }
    for key, value in wanted.items():
        assert list(curves[f"final/{key}"].values()) == pytest.approx([value], rel=1e-6), key
        assert list(curves[f"final/{key}"]) == [3]


def test_tensorboard_shows_the_mask(out: Path) -> None:
    _, events = of_events(out / "tensorboard" / "version_0")
    assert {"mask", "mask/keep_probability"} <= set(events.Tags()["images"])


def written(data: bytes) -> Iterator[bytes]:
    """The entries of W&B's file: LevelDB's log, blocks of 32 KiB, behind a header of 7 bytes."""
    at, entry = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        entry += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield entry
            entry = b""


def of_wandb(out: Path) -> tuple[Curves, dict[str, Any], Path]:
    """Metrics, settings, and the directory of the run."""
    from wandb.proto.wandb_internal_pb2 import Record

    (folder,) = (out / "wandb").glob("offline-run-*")
    (file,) = folder.glob("run-*.wandb")
    curves: Curves = defaultdict(dict)
    settings: dict[str, Any] = {}
    for entry in map(Record.FromString, written(file.read_bytes())):
        settings |= {item.key: json.loads(item.value_json) for item in entry.run.config.update}
        settings |= {item.key: json.loads(item.value_json) for item in entry.config.update}
        row = {
            item.key or item.nested_key[0]: json.loads(item.value_json)
            for item in entry.history.item
            if len(item.nested_key) < 2  # else it tells of a picture
        }
        for tag, value in row.items():
            if isinstance(value, int | float) and "trainer/global_step" in row:
                curves[tag][row["trainer/global_step"]] = value
    return curves, settings, folder


def of_mlflow(out: Path) -> tuple[Curves, Any, set[str]]:
    """Metrics, the run, and the names of its files."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"file:{out}/mlruns")
    experiment = client.get_experiment_by_name("e3pruner")
    (found,) = client.search_runs([experiment.experiment_id])
    histories = {tag: client.get_metric_history(found.info.run_id, tag) for tag in found.data.metrics}
    curves = {tag: {point.step: point.value for point in points} for tag, points in histories.items()}
    return curves, found, {item.path for item in client.list_artifacts(found.info.run_id)}


@pytest.mark.skipif("wandb" not in INSTALLED, reason="needs the extra wandb")
def test_wandb_holds_it_in_its_offline_directory(out: Path) -> None:
    curves, settings, folder = of_wandb(out)
    run = out / "search" / "logged"
    alike(of_events(run)[0], curves)
    results(run, curves)
    assert settings["model"]["init_args"]["policy"]["init_args"]["form"] == "softmax"
    kept = {path.name: path for path in (folder / "files").rglob("*") if path.is_file()}
    for name in ("mask.json", "record.json", "gates.json"):
        assert kept[name].read_bytes() == (run / name).read_bytes()
    assert any(path.suffix == ".png" for path in kept.values())


@pytest.mark.skipif("mlflow" not in INSTALLED, reason="needs the extra mlflow")
def test_mlflow_holds_it_in_its_file_store(out: Path) -> None:
    curves, found, kept = of_mlflow(out)
    run = out / "search" / "logged"
    alike(of_events(run)[0], curves)
    results(run, curves)
    assert found.data.params["model/init_args/policy/init_args/form"] == "softmax"
    assert found.info.status == "FINISHED"
    assert kept == {*loggers.RESULTS, "mask.png"}


@pytest.mark.skipif(EXTRAS.keys() - {*INSTALLED} != set(), reason="needs the extras wandb and mlflow")
def test_one_run_has_equal_figures_in_all_four(out: Path) -> None:
    """The same metrics at the same steps, bit for bit in float32, which is what TensorBoard keeps."""
    held = [of_csv(out), of_events(out / "tensorboard" / "version_0")[0], of_wandb(out)[0], of_mlflow(out)[0]]
    plain = [
        {
            tag: {step: np.float32(value) for step, value in curve.items()}
            for tag, curve in curves.items()
            if "/" in tag and not tag.startswith("trainer/")
        }
        for curves in held
    ]
    assert len({tag for tag in plain[0] if tag.startswith("final/")}) >= 5
    assert plain[0] == plain[1] == plain[2] == plain[3]


@pytest.mark.parametrize("name", EXTRAS)
def test_a_package_that_is_missing_is_one_message(
    name: str, tmp_path: Path, teacher_dir: str, corpus_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if name in INSTALLED:
        pytest.skip("it is installed")
    files = Files(tmp_path, teacher_dir, corpus_file, "")
    assert ended([*files.command("search", "run"), *overlay(name, tmp_path)]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: a part of this experiment is not installed: ")
    assert name in said
    assert "\n" not in said
    assert not (tmp_path / "search").exists()


def test_beside_no_logger_it_is_refused(
    tmp_path: Path, teacher_dir: str, corpus_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = Files(tmp_path, teacher_dir, corpus_file, "")
    kept = [word for word in files.command("search", "x") if "logger" not in word]
    assert ended([*kept, "--trainer.logger=false", *overlay("csv", tmp_path), "--trainer.callbacks=null",
                  *overlay("csv", tmp_path)]) == 2  # fmt: skip
    assert "trainer.logger: none given" in capsys.readouterr().err
    assert not (tmp_path / "csv").exists()


def test_a_list_of_loggers_works_too_and_the_first_names_the_directory(
    tmp_path: Path, teacher_dir: str, corpus_file: str
) -> None:
    files = Files(tmp_path, teacher_dir, corpus_file, "")
    listed = [
        {
            "class_path": f"lightning.pytorch.loggers.{kind}",
            "init_args": {"save_dir": str(tmp_path), "name": name},
        }
        for kind, name in (("TensorBoardLogger", "first"), ("CSVLogger", "second"))
    ]
    kept = [word for word in files.command("search", "x", steps=2) if "logger" not in word]
    assert ended([*kept, f"--trainer.logger={json.dumps(listed)}"]) == 0
    run = tmp_path / "first" / "version_0"
    assert (run / "mask.json").exists()
    assert "mask/keep_probability" in of_events(run)[1].Tags()["images"]
    assert (tmp_path / "second" / "version_0" / "metrics.csv").exists()
    assert ended(["fit", f"--ckpt_path={run}/checkpoints/last.ckpt", "--trainer.max_steps=3"]) == 0
    assert {path.name for path in (tmp_path / "first").iterdir()} == {"version_0"}
