"""What identifies the arithmetic of a machine."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from benchmark.storage.machine import _processor, arithmetic


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\n"
            "processor\t: 1\nvendor_id\t: Other\n",
            "AuthenticAMD 25 17",
        ),
        ("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n", "0x41 0xd40"),
    ],
)
def test_a_processor_is_named_by_vendor_family_and_model(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert _processor(tmp_path / "cpuinfo") == expected


def test_a_system_without_cpuinfo_names_what_python_knows(tmp_path: Path) -> None:
    assert _processor(tmp_path / "none") == (platform.processor() or "unknown")


def test_two_processors_with_the_same_instructions_are_two_machine_types(monkeypatch: pytest.MonkeyPatch) -> None:
    here = arithmetic()
    monkeypatch.setattr("benchmark.storage.machine._processor", lambda cpuinfo: "another")
    assert arithmetic() != here
    assert {**arithmetic(), "processor": here["processor"]} == here
