"""What the pages say can be typed: marked blocks run, others parse, make targets and linked files exist."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from pkgutil import resolve_name

import pytest

from src.cli import TOOLS, VERBS, main, run
from tests.blocks import PAGES, blocks, run_by

HERE = "tests/integration/test_readme.py"
SHORT = {
    "configs/search": ["--trainer.max_steps=4", "--model.init_args.calibration_batches=1"],
    "configs/recover": ["--trainer.max_steps=4", "--trainer.limit_val_batches=1"],
}  # fmt: skip


def shown_commands() -> list[list[str]]:
    """Arguments of each command line in the fenced blocks of all pages, without those that are run here."""
    shown = {
        " ".join(given): given
        for page in PAGES
        for block in blocks(page)
        if block.how != HERE
        for command in block.commands
        if (given := [word for word in command if word != "..."])
    }
    return list(shown.values())


def test_the_commands_of_the_readme_run(
    tmp_path: Path, teacher_dir: str, corpus_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {
        "MODEL": teacher_dir, "train.jsonl": corpus_file, "held_out.jsonl": corpus_file,
        "my-shorter-model": str(tmp_path / "short"),
    }  # fmt: skip
    (block,) = run_by(HERE)
    assert [command[0] for command in block.commands] == ["fit", "fit", "export", "evaluate", "benchmark"]
    for command in block.commands:
        argv = [places.get(word, word) for word in command]
        argv = [re.sub(r"^logs/", f"{tmp_path}/logs/", word) for word in argv]
        for folder, shorter in SHORT.items():
            if any(word.startswith(folder) for word in argv):
                argv += [
                    *shorter,
                    f"--trainer.logger.init_args.save_dir={tmp_path}/logs",
                    "--trainer.accelerator=cpu",
                ]
        if argv[0] == "benchmark":
            argv += ["--repeats", "1", "--new-tokens", "2"]
        if argv[0] == "evaluate":
            argv += ["--limit", "4", "--max-new-tokens", "4"]
        run(argv)
    assert (tmp_path / "short" / "config.json").exists()
    assert (tmp_path / "short" / "README.md").exists()
    capsys.readouterr()


@pytest.mark.parametrize("given", shown_commands(), ids=lambda given: " ".join(given)[:60])
def test_every_command_that_is_shown_parses(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    verb, rest, own = given[0], given[1:], set[str]()
    if verb in TOOLS:
        with pytest.raises(SystemExit):
            run([verb, "--help"])
        own = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
        own -= {"--config"} if verb in ("plan", "preview") else set()
    at_own = {at for at, word in enumerate(rest) if word in own}
    keys = [word for at, word in enumerate(rest) if not at_own & {at, at - 1}]
    if verb in TOOLS and verb not in ("plan", "preview"):
        assert not [word for word in keys if word.startswith("--")], "options that the tool lacks"
    else:  # what fit takes
        with pytest.raises(SystemExit) as ended:
            run([verb if verb in VERBS else "fit", *keys, "--print_config"])
        assert ended.value.code == 0


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_make_targets_exist(page: Path) -> None:
    makefile, text = Path("Makefile").read_text(), page.read_text()
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_make_help_lists_every_public_target() -> None:
    listed = subprocess.run(["make", "-s", "help"], capture_output=True, text=True, check=True).stdout
    for target in ("setup", "demo", "test", "test-full", "lint", "types", "teacher", "tensorboard", "clean"):
        assert f"make {target} " in listed


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_linked_files_exist(page: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)[)#]", page.read_text()):
        assert (page.parent / target).exists(), target


def headings(page: Path) -> set[str]:
    """The anchors of a page."""
    return {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.*)", page.read_text(), re.M)
    }


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_linked_sections_exist(page: Path) -> None:
    for target, section in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", page.read_text()):
        assert section in headings(page.parent / target if target else page), (target, section)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["shorten", "MODEL=m"], "give MODEL=NAME and TRAIN=TEXT"),
        (["shorten", "MODEL=", "TRAIN=t"], "give MODEL=NAME and TRAIN=TEXT"),
        (
            ["shorten", "MODEL=m", "TRAIN=t", "HELDOUT=h"],
            "HELDOUT: make shorten reads no such variable; accepted",
        ),
        (["demo", "SEEDS=1"], "SEEDS: make demo reads no such variable; accepted: RUN SEED"),
        *(
            (["demo", f"RUN={name}"], f"RUN: '{name}' given; accepted: a path that begins with no -")
            for name in (
                "",
                "my runs",
                "run ",
                "-n",
                "a:b",
                "a%b",
                "a=b",
                "a,b",
                "a#b",
                "it's",
                "a;b",
                "a\\b",
                "null",
            )
        ),
    ],
)
def test_make_refuses_before_it_installs_anything(words: list[str], told: str) -> None:
    done = subprocess.run(
        ["make", "--no-print-directory", "-n", "VENV=none", *words], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert told in done.stderr


def test_make_hands_over_what_it_is_given_as_it_is() -> None:
    given = {"MODEL": "it's mine", "TRAIN": "a b.jsonl", "TARGET": "{speedup: 1.3}", "OUT": "my model"}
    words = [f"{key}={value}" for key, value in given.items()]
    done = subprocess.run(
        ["make", "--no-print-directory", "-n", "shorten", *words], capture_output=True, text=True, check=True
    )
    parts = shlex.split(done.stdout)
    assert [part for part in parts if part.partition("=")[2] in given.values()] == [
        f"--{key.lower()}={value}" for key, value in given.items()
    ]


@pytest.mark.parametrize("options", ["--x '[a;b]'", "--x it\\'s", '--x "$$(a)" & `b`'])
def test_the_demo_notes_its_options_as_they_are(options: str, tmp_path: Path) -> None:
    """What is noted is what makes a stage begin anew, and no part of it is run."""
    noted = tmp_path / ".search"
    words = [f"RUN={tmp_path}", "SEED=7", f"SEARCH={options}"]
    subprocess.run(["make", "--no-print-directory", "-s", str(noted), *words], check=True)
    assert noted.read_text() == f"7 {options.replace('$$', '$')}\n"


@pytest.mark.parametrize(
    ("place", "stage"),
    [("RUN", "search"), ("RUN", "recover"), ("RUN", "data"), ("CUT", "search"), ("CUT", "recover")],
)
def test_make_leaves_what_it_did_not_begin(place: str, stage: str, tmp_path: Path) -> None:
    (begun := tmp_path / stage / "checkpoints/last.ckpt").parent.mkdir(parents=True)
    begun.write_text("by hand")
    noted = tmp_path / f".{stage}"
    argv = ["make", "--no-print-directory", "-s", str(noted), f"{place}={tmp_path}"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"{tmp_path / stage}: make did not begin it" in done.stderr
    assert begun.read_text() == "by hand"
    assert not noted.exists()
    (tmp_path / stage).rename(tmp_path / "mine")
    subprocess.run(argv, check=True)
    assert noted.exists()


NAMED = [*PAGES, Path("Makefile"), *sorted(Path("configs").rglob("*.yaml"))]
EXAMPLES = re.findall(r"<!-- file: (\S+) -->", Path("CONTRIBUTING.md").read_text())
"""Files of the worked examples, which a test of their own makes."""


@pytest.mark.parametrize("page", NAMED, ids=str)
def test_files_that_are_named_exist(page: Path) -> None:
    roots = "src|tests|scripts|configs|docs|assets"
    for name in re.findall(rf"(?<![\w./-])((?:{roots})/[\w./-]*\w)", page.read_text()):
        assert Path(name).exists() or name in EXAMPLES, name


@pytest.mark.parametrize("page", NAMED, ids=str)
def test_modules_and_classes_that_are_named_exist(page: Path) -> None:
    made = {name.removesuffix(".py").replace("/", ".") for name in EXAMPLES}
    for name in re.findall(r"\b((?:src|scripts|tests)(?:\.\w+)+)", page.read_text()):
        if not any(f"{name}.".startswith(f"{module}.") for module in made):
            resolve_name(name)


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    told = capsys.readouterr().out
    assert all(verb in told for verb in (*VERBS, *TOOLS))


@pytest.mark.parametrize("tool", TOOLS)
def test_help_of_each_tool_is_readable(tool: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run([tool, "--help"])
    assert stop.value.code == 0
    told = capsys.readouterr().out
    assert tool in told
    assert max(map(len, told.splitlines())) <= 130
