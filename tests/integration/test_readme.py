"""What the README says can be typed: marked blocks run, make targets and linked files exist."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from src.cli import TOOLS, VERBS, main, run

README = Path("README.md").read_text()
SHORT = {
    "configs/search": ["--trainer.max_steps=4", "--model.init_args.calibration_batches=1"],
    "configs/recover": ["--trainer.max_steps=4", "--trainer.limit_val_batches=1"],
}  # fmt: skip


def marked_commands() -> list[list[str]]:
    """Command lines of the blocks after ``<!-- run -->``."""
    blocks = re.findall(r"<!-- run -->\s*```bash\n(.*?)```", README, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if shlex.split(line, comments=True)]


def test_the_commands_of_the_readme_run(
    tmp_path: Path, teacher_dir: str, corpus_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {
        "MODEL": teacher_dir, "train.jsonl": corpus_file, "held_out.jsonl": corpus_file,
        "my-shorter-model": str(tmp_path / "short"),
    }  # fmt: skip
    commands = marked_commands()
    assert [command[3] for command in commands] == ["fit", "fit", "export", "evaluate", "benchmark"]
    for command in commands:
        assert command[:3] == ["python", "-m", "src.cli"]
        argv = [places.get(word, word) for word in command[3:]]
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


def test_make_targets_exist() -> None:
    makefile = Path("Makefile").read_text()
    for target in set(re.findall(r"`make ([a-z-]+)", README)) | set(
        re.findall(r"^make ([a-z-]+)", README, re.M)
    ):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_make_help_lists_every_public_target() -> None:
    listed = subprocess.run(["make", "-s", "help"], capture_output=True, text=True, check=True).stdout
    for target in ("setup", "demo", "test", "test-full", "lint", "types", "teacher", "tensorboard", "clean"):
        assert f"make {target} " in listed


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert Path(target).exists(), target


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
