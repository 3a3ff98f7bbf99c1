"""How far one process, two of DDP and two of FSDP2 drift apart: the figures of the test that bounds them."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

from scripts.lab.results import JSON

TEST = "tests/distributed/test_equality.py::test_one_process_equals_two_of_ddp_and_two_of_fsdp2"


def measure(work: Path) -> JSON:
    """Run the test and read what it noted; it fails where a bound is broken."""
    report = work / "equality.xml"
    command = [sys.executable, "-m", "pytest", "-q", TEST, f"--junitxml={report}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    notes = {note.attrib["name"]: note.attrib["value"] for note in ET.parse(report).iter("property")}
    if not notes:
        raise SystemExit(f"{TEST} noted nothing: it was skipped.")
    steps = int(notes.pop("steps"))
    drift = {name: {"max": float(t.split()[1]), "mean": float(t.split()[3])} for name, t in notes.items()}
    return {"steps": steps, "drift": drift}
