"""Images that the command opens: traced, if asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from qedcore.cli import open as open_module
from qedcore.cli.main import main


def test_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_module, "_tracing", {})
    path = str(tmp_path / "x.qed")
    assert main(["create", "-q", path, "1M"]) == 0
    (tmp_path / "data").write_bytes(b"x" * 65536)
    assert main(["convert", "-O", "qed", str(tmp_path / "data"), path]) == 0
    assert main(["-T", "qed_read_table", "map", path]) == 0
    assert "qed_read_table s" in capsys.readouterr().err
    assert main(["-T", "nonsense", "map", path]) == 1
