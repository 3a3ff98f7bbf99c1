"""What the public model's targets run, publish and refuse, as make prints it."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.blocks import run_by

PAGE = Path("docs/public_model.md")
MADE = Path("Makefile").read_text()
RUNS = re.findall(r"^RUNS +:= .*,(.+)\)$", MADE, re.M)[0].split()


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """The files that the targets ask for, empty."""
    for name in re.findall(r"^\| `([\w./]+)` \| ", PAGE.read_text(), re.M):
        (file := tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return tmp_path


MAKES = ("MAKE", "MFLAGS", "PARENT", "PUBLIC", "KEEP", "CUT", "SEED", "SEARCH", "RECOVER", "SHARED", "E3_")
"""Variables of the environment that would tell make another thing: make sets some of them itself."""


def make(*words: str) -> subprocess.CompletedProcess[str]:
    """What make would run, from nothing."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(MAKES)}
    argv = ["make", "--no-print-directory", "-nB", *words]
    return subprocess.run(argv, capture_output=True, text=True, env=env)


def printed(target: str, shared: Path, *words: str) -> str:
    done = make(target, f"SHARED={shared}", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_missing_is_told_before_anything_is_done(shared: Path) -> None:
    def told(*words: str) -> str:
        done = make("public-model", *words)
        assert (done.returncode, done.stdout) == (2, "")
        return done.stderr

    assert "SHARED: 'my data' given; accepted" in told("SHARED=my data")
    assert "KEEP: '31' given; accepted: 1 to 29" in told(f"SHARED={shared}", "KEEP=31")
    (shared / "data/eval/piqa.jsonl").unlink()
    assert f"SHARED: no {shared}/data/eval/piqa.jsonl; accepted" in told(f"SHARED={shared}")
    assert printed("public-contest", shared), "which does not read it"


@pytest.mark.parametrize("target", ["public-model", "public-contest", "headline", "fair-fight", "on-policy"])
def test_a_target_names_configs_that_are_there_and_keeps_what_it_makes(target: str, shared: Path) -> None:
    made = printed(target, shared) if target.startswith("public") else make(target).stdout
    named = set(re.findall(r"configs/[\w/.-]+\.yaml", made))
    assert named
    assert [name for name in sorted(named) if not Path(name).is_file()] == []
    assert not re.search(r"^rm ", made, re.M), "make would delete what it takes for a step in between"


def test_each_method_of_the_contest_has_its_overlay(shared: Path) -> None:
    methods = re.findall(r"^METHODS := (.+)$", MADE, re.M)[0].split()
    made = printed("public-contest", shared)
    overlays = re.findall(r"search.yaml +--config configs/(?:policy|unit)/(\w+)\.yaml", made)
    assert sorted([*overlays, "gumbel_topk"]) == sorted(methods)


def test_the_page_prints_the_commands_of_the_target(shared: Path) -> None:
    made = re.sub(
        r"\$\(\((\d+) - (\d+)\)\)", lambda m: str(int(m[1]) - int(m[2])), printed("public-model", shared)
    )
    run = [shlex.split(line.partition("python ")[2]) for line in made.splitlines() if "python -m" in line]
    shown = [line for block in run_by("make public-model", [PAGE]) for line in block.lines]
    assert len(shown) > 10
    for _, *words in shown:
        assert [word.replace("../shared", str(shared)) for word in words] in run


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("public-model", ["RECOVER=--trainer.max_steps 9"]),
        ("public-model", ["SEARCH=--x 1"]),
        ("public-model", ["CUT=logs/public-model/22", "KEEP=25"]),
        ("public-model", ["SEED=3"]),
        ("public-model", ["KEEP=24"]),
        ("public-model", ["CUT=logs/public-model/22"]),
        ("public-contest", ["SEED=1"]),
        *((target, words) for target in ("public-model", "public-contest") for words in (
            ["PARENT=a/b"], ["PARENT=a/b", "PUBLIC=logs/public-model"], ["PUBLIC=logs/x"],
        )),
    ],
)  # fmt: skip
def test_only_the_runs_of_the_page_are_published(target: str, words: list[str], shared: Path) -> None:
    publishes = r"public_model page|readme_results|results/"
    assert re.search(publishes, printed(target, shared))
    assert not re.search(publishes, printed(target, shared, *words))


@pytest.mark.parametrize("run", RUNS)
def test_the_page_has_a_place_for_each_run_that_is_published(run: str, shared: Path) -> None:
    kept, _, seed = run.partition("-s")
    made = printed("public-model", shared, f"KEEP={kept}", f"SEED={seed or 0}")
    assert re.findall(r"public_model page --run logs/public-model/(\S+)", made) == [run]
    parts = ["costs", "held out", *([] if seed else ["results", "answers", "curve"])]
    text = PAGE.read_text()
    assert [part for part in parts if text.count(f"<!-- {part} {run} -->") != 1] == []
    judged = text.split(f"<!-- held out {run} -->")[1].split("<!--")[0]
    assert f"| logs/public-model/{run}/recovered |" in judged, "scripts/readme_results.py fills it"


@pytest.mark.parametrize(
    ("words", "where"),
    [
        ([], "results"),
        (["MODEL=logs/public-model/22/recovered"], "results"),
        (["MODEL=logs/public-model/22/recovered/"], "results"),
        (["MODEL=logs/public-model/22/recovered", "PROMPTS=my.jsonl"], "logs"),
        (["MODEL=my/export", "PARENT=my/parent"], "logs"),
        (["MODEL=logs/public-model/22/recovered", "PARENT=my/parent"], "logs"),
        (["MODEL=logs/public-model/22/recovered logs/mine"], "logs"),
        (["MODEL=logs/demo/recovered"], "logs"),  # whose parent is another than that of make's default
        (["RUN=logs/mine"], "logs"),
    ],
)
def test_other_engines_are_published_for_the_models_of_the_page_alone(words: list[str], where: str) -> None:
    assert make("other-engine", *words).stdout.strip().endswith(f"--out {where}/other_engine.json")


def test_what_a_machine_would_take_is_planned_by_the_type_of_the_weights(shared: Path) -> None:
    """None of it needs a run of one's own: the mask is the published one."""
    made = [line for line in printed("public-plans", shared).splitlines() if "src.cli plan " in line]
    names = [re.findall(r"--json \S+/plans/(\w+)\.json", line)[0] for line in made]
    extra = ("search_float32", "search_int8", "recover_float32")
    assert sorted(names) == sorted(["search", "search_shipped", "recover", *extra])
    own = {name: line.replace(f"plans/{name}.json", "") for name, line in zip(names, made, strict=True)}
    for name, kind in (("search", "float32"), ("search", "int8"), ("recover", "float32")):
        assert own[f"{name}_{kind}"].startswith(own[name].strip())
        assert kind in own[f"{name}_{kind}"].removeprefix(own[name].strip())
    assert "configs/public_model" not in own["search_shipped"]
    assert "--model.init_args.mask results/public_model_22_mask.json" in own["recover"]


def test_the_page_shows_what_the_plans_say() -> None:
    rows = re.findall(
        r"\(\.\./results/(public_plan_\w+\.json)\).*\| ([\d.]+) \| ([\d.]+) \|", PAGE.read_text()
    )
    assert len(rows) == 5
    for name, hours, gib in rows:
        plan = json.loads(Path("results", name).read_text())["configured"]
        assert (hours, gib) == (f"{plan['hours']:.2f}", f"{plan['total'] / 2**30:.1f}")
    shipped = json.loads(Path("results/public_plan_search_shipped.json").read_text())
    told = f"[{shipped['configured']['hours']:.1f} hours](../results/public_plan_search_shipped.json)"
    assert told in PAGE.read_text()
    assert f"{shipped['within']['steps']} of them fit into two" in PAGE.read_text()


def test_seeds_are_compared_by_a_target_of_their_own(shared: Path) -> None:
    for kept in ("22", "25"):
        done = make("public-seeds", f"KEEP={kept}")
        of = [f"logs/public-model/{run}" for run in RUNS if run.split("-")[0] == kept]
        assert f"compare {' '.join(of)} --json results/public_seeds_{kept}.json" in done.stdout
        assert f"<!-- seeds_{kept} -->" in PAGE.read_text()
    assert "SEED: make public-seeds reads no such variable" in make("public-seeds", "SEED=1").stderr


def test_parents_of_one_name_have_places_of_their_own(shared: Path) -> None:
    places = {
        re.search(r"report --run (\S+)", printed("public-model", shared, f"PARENT={x}/m"))[1] for x in "ab"
    }  # type: ignore[index]
    assert places == {"logs/public-model-a--m/22", "logs/public-model-b--m/22"}
