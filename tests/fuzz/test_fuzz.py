"""Some cases of the fuzzer; QED_FUZZ_CASES=N for more."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fuzz
import guided
import pytest
from support.tools import scratch

CASES = int(os.environ.get("QED_FUZZ_CASES", "150"))
PART = 50


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="qedfuzz-", dir=scratch()) as directory:
        yield Path(directory)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", range(0, CASES, PART))
def test_cases(place: Path, first: int) -> None:
    fuzz.run(os.environ["QED_TEST_SEED"], first, min(PART, CASES - first), place)


@pytest.mark.timeout(600)
def test_corpus(place: Path) -> None:
    """What `make fuzz` has kept: it reaches more of the engine than as many random cases."""
    cases = guided.corpus()
    assert len(cases) > 50
    for data in cases:
        guided.try_case(data, place / "case")


# The fuzzer finds what it should


def test_choices_are_read_from_bytes() -> None:
    data = bytes(range(100, 200))
    first, second = (guided.Choices(data) for _ in range(2))
    assert [first.choice("abcdefg") for _ in range(20)] == [second.choice("abcdefg") for _ in range(20)]
    assert len(set(guided.Choices(data).choices(range(1000), k=20))) > 10
    assert guided.Choices(b"").randrange(1000) == 0


def test_a_forbidden_file_is_noticed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"")
    (tmp_path / "allowed").mkdir()
    with pytest.raises(fuzz.Finding, match="F3"):
        with fuzz.watch().only(tmp_path / "allowed"):
            secret.read_bytes()


def test_memory_is_noticed() -> None:
    with pytest.raises(fuzz.Finding, match="F2"):
        with fuzz.limits():
            assert bytearray(fuzz.MEMORY_LIMIT + fuzz.MiB).count(1) == 0


def test_a_hang_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "CPU_LIMIT", 0.01)
    with pytest.raises(fuzz.Hang, match="F2"):
        with fuzz.limits():
            while True:
                pass


def test_changed_data_is_noticed(place: Path) -> None:
    """Intact pieces are found in every sound image, and a lost byte of one shows."""
    case = fuzz.make_case(random.Random(3), place)
    guest = fuzz.intact(case)
    assert guest.pieces
    with fuzz.QedFile(case.path) as image:
        guest.check(lambda n, pos: image.read(pos, n), "now")
        next(iter(guest.pieces.values()))[5] ^= 1
        with pytest.raises(fuzz.Finding, match="F5"):
            guest.check(lambda n, pos: image.read(pos, n), "now")
