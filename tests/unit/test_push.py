"""A push, against a Hub on the loopback: the Hub has the export to the byte or nothing, and it is private."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from huggingface_hub import constants

from src.errors import ConfigError
from src.export import proof, push
from src.export.observe import Finding

NAME = "user/shorter"


class Hub(ThreadingHTTPServer):
    """The part of the Hub that a push speaks with."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.fails = ""
        """End of the paths that are answered by an error."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for key, value in {
            **headers,
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
        }.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.headers["Authorization"] != "Bearer hf_stub":
            self.answer({"error": "who are you"}, 401)
        elif self.path == "/api/whoami-v2":
            self.answer({"name": "user", "type": "user"})
        elif (name := self.path.removeprefix("/api/models/")) in self.server.private:
            self.answer({"id": name, "private": self.server.private[name]})
        else:
            self.answer({"error": "not found"}, 404, X_Error_Code="RepoNotFound")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        name = "/".join(self.path.split("/")[3:5])
        if self.server.fails and self.path.endswith(self.server.fails):
            self.answer({"error": "no space left"}, 507)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            known = name in self.server.private
            self.server.private.setdefault(name, asked["visibility"] == "private")
            self.answer({"url": f"{self.server.url}/{name}"}, 409 if known else 200)
        elif self.path.endswith("/preupload/main"):
            listed = [file["path"] for file in json.loads(body)["files"]]
            self.answer(
                {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in listed]}
            )
        elif self.path.endswith("/commit/main"):
            lines = [json.loads(line) for line in body.splitlines()]
            files = {each["value"]["path"]: base64.b64decode(each["value"]["content"]) for each in lines[1:]}
            self.server.files[name] = {**self.server.files.get(name, {}), **files}
            self.answer({"commitOid": "a" * 40, "commitUrl": f"{self.server.url}/{name}/commit/{'a' * 40}"})
        else:
            self.answer({"errors": [], "warnings": []})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub, to which this process is logged in."""
    hub = Hub()
    Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_stub")
    yield hub
    hub.shutdown()
    hub.server_close()


def held(directory: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()
    }


def test_the_hub_holds_the_export_to_the_byte_and_private(
    run: Callable[..., Path], hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "of the run.html"
    report.write_text("<p>report</p>")
    out = run("--push", NAME, "--report", str(report))
    assert hub.files == {NAME: {**held(out), "report.html": report.read_bytes()}}
    assert {"README.md", "mask.json", "config.json", "tokenizer.json"} <= set(hub.files[NAME])
    assert b"| weights as predicted, nothing else stored |" in hub.files[NAME]["README.md"], "the proof"
    assert hub.private == {NAME: True}
    assert f"pushed: {hub.url}/{NAME}" in capsys.readouterr().out


def test_everybody_sees_it_only_if_asked_and_one_that_exists_stays_as_it_is(
    run: Callable[..., Path], hub: Hub
) -> None:
    out = run("--push", NAME, "--public")
    assert hub.private == {NAME: False}
    run("--push", NAME, "--force")
    assert hub.private == {NAME: False}
    assert hub.files == {NAME: held(out)}


def test_a_name_that_is_taken_is_refused_before_any_work(
    run: Callable[..., Path], hub: Hub, tmp_path: Path
) -> None:
    hub.private[NAME] = True
    with pytest.raises(ConfigError, match=f"'{NAME}' exists on the Hub.*--force"):
        run("--push", NAME)
    assert not (tmp_path / "out").exists()
    assert hub.files == {}


@pytest.mark.parametrize(
    ("name", "token", "report", "said"),
    [
        ("shorter", "hf_stub", None, "accepted: USER/NAME"),
        ("u/a/b", "", None, "accepted: USER/NAME"),
        ("user/a b", "hf_stub", None, "'user/a b' given"),
        ("", "hf_stub", None, "'' given"),
        (NAME, "hf_other", None, "hf auth login"),
        (NAME, "hf_stub", "none.html", "there is no file 'none.html'"),
    ],
)
def test_what_would_fail_is_refused_before_any_work(
    name: str, token: str, report: str | None, said: str, run: Callable[..., Path], hub: Hub, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ConfigError) as fault:
        run("--push", name, *(["--report", report] if report else []))
    assert said in str(fault.value)
    assert "\n" not in str(fault.value)
    assert not (tmp_path / "out").exists()
    assert (hub.private, hub.files) == ({}, {})


def test_a_hub_that_cannot_be_reached_is_one_message(
    run: Callable[..., Path], hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="--push: the Hub"):
        run("--push", NAME)
    assert not (tmp_path / "out").exists()


def test_what_is_not_proven_is_not_pushed(
    run: Callable[..., Path], hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "in_fresh_process", lambda *_: [Finding("logits", False, "they differ")])
    with pytest.raises(ConfigError, match="the proof failed"):
        run("--push", NAME)
    assert not (tmp_path / "out").exists()
    assert (hub.private, hub.files) == ({}, {})


def test_a_push_that_fails_leaves_the_export_and_nothing_of_it_on_the_hub_and_can_be_made_later(
    run: Callable[..., Path], hub: Hub, tmp_path: Path
) -> None:
    hub.fails = "/commit/main"
    (report := tmp_path / "my report.html").touch()
    with pytest.raises(ConfigError) as fault:
        run("--push", NAME, "--public", "--report", str(report))
    out, hub.fails = tmp_path / "out", ""
    again = shlex.split(str(fault.value).partition("python -m src.export.push ")[2])
    assert again == [str(out), NAME, "--force", "--public", "--report", str(report)]
    assert (out / "config.json").exists()
    assert hub.files == {}
    with pytest.raises(ConfigError, match="exists on the Hub"):
        push.main([str(out), NAME])
    push.main(again)
    assert hub.files == {NAME: held(out) | {"report.html": b""}}
    with pytest.raises(ConfigError, match="is no export"):
        push.main([str(tmp_path / "none"), NAME])


@pytest.mark.parametrize("more", [["--public"], ["--report", "r.html"]])
def test_what_is_said_of_a_push_that_is_not_asked_for_is_refused(
    more: list[str], run: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"{more[0]}: given without --push"):
        run(*more)
    assert not (tmp_path / "out").exists()


def test_without_the_option_the_hub_hears_nothing(run: Callable[..., Path], hub: Hub) -> None:
    hub.shutdown()  # whoever asks would wait for ever
    assert (run() / "config.json").exists()
