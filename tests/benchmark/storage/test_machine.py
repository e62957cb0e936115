"""What identifies the arithmetic of a machine."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from benchmark.storage.machine import _processor, arithmetic, has_bfloat16


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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 amx_tile\n", True),
        ("flags\t\t: fpu amx_bf16\n", True),
        ("Features\t: fp asimd bf16\n", True),
        ("flags\t\t: fpu avx2 avx512f\n\nflags\t\t: avx512_bf16\n", False),
        ("", False),
    ],
)
def test_instructions_for_bfloat16_are_read_from_the_processors_flags(tmp_path: Path, text: str, expected: bool) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert has_bfloat16(tmp_path / "cpuinfo") is expected
    assert not has_bfloat16(tmp_path / "none")


def test_a_system_without_cpuinfo_names_what_python_knows(tmp_path: Path) -> None:
    assert _processor(tmp_path / "none") == (platform.processor() or "unknown")


def test_two_processors_with_the_same_instructions_are_two_machine_types(monkeypatch: pytest.MonkeyPatch) -> None:
    here = arithmetic()
    monkeypatch.setattr("benchmark.storage.machine._processor", lambda cpuinfo: "another")
    assert arithmetic() != here
    assert {**arithmetic(), "processor": here["processor"]} == here
