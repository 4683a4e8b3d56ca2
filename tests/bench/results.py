"""Results as JSON: rows, samples, settings and environment; and the environment itself."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.clients import PYTHON
from bench.rows import GiB, Row, Sample
from bench.servers import BenchError, run

FORMAT = 1


@dataclass
class Results:
    rows: list[Row] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)  # row, contender or both -> why
    failures: list[str] = field(default_factory=list)  # runs that were tried again
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    def measured_rows(self, scale: bool) -> list[Row]:
        """Those with samples, of the table or of the curves."""
        names = {s.row for s in self.samples}
        return [row for row in self.rows if row.name in names and bool(row.curve) == scale]

    def save(self, path: Path) -> None:
        document = {
            "format": FORMAT,
            "environment": self.environment,
            "settings": self.settings,
            "left_out": self.left_out,
            "failures": self.failures,
            "rows": [fields_of(row) for row in self.rows],
            "samples": [fields_of(sample) for sample in self.samples],
        }
        path.write_text(json.dumps(document, indent=1) + "\n")


def fields_of(item: Row | Sample) -> dict[str, Any]:
    """All that differ from the default."""
    defaults = {f.name: f.default for f in dataclasses.fields(item)}
    return {k: v for k, v in dataclasses.asdict(item).items() if v != defaults[k]}


def load(paths: Iterable[Path]) -> Results:
    """Several results as one.  Rounds of different files are not compared with each other."""
    results = Results()
    for number, path in enumerate(paths):
        try:
            document = json.loads(path.read_text())
            if document["format"] != FORMAT:
                raise BenchError(f"{path}: format {document['format']} is unknown")
            known = {row.name for row in results.rows}
            results.rows += [Row(**row) for row in document["rows"] if row["name"] not in known]
            results.samples += [Sample(**{**sample, "run": number}) for sample in document["samples"]]
            results.left_out.update(document["left_out"])
            results.failures += document["failures"]
            results.settings = results.settings or document["settings"]
            results.environment = results.environment or document["environment"]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise BenchError(f"{path}: no results of this benchmark: {e!r}") from e
    return results


def environment(directory: Path, plugin: Path) -> dict[str, str]:
    """What the figures depend on."""

    def version(*command: str) -> str:
        return run(*command).splitlines()[0].split(" (")[0] if shutil.which(command[0]) else "none"

    cpu = next((s for s in Path("/proc/cpuinfo").read_text().splitlines() if s.startswith("model name")), "")
    file_system = run("stat", "-f", "-c", "%T", os.fspath(directory)).strip()
    modules = "import sys; print(sys.version.split()[0])\ntry: import numpy\nexcept ImportError: print('none')\n"
    modules += "else: print(numpy.__version__)"
    python, numpy = run(PYTHON, "-c", modules).split()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "plugin": git_commit(plugin.parents[1]),
        "qemu": version("qemu-img", "--version").replace("qemu-img version ", ""),
        "nbdkit": version("nbdkit", "--version").replace("nbdkit ", ""),
        "nbdcopy": version("nbdcopy", "--version").replace("nbdcopy ", ""),
        "fio": version("fio", "--version").replace("fio-", ""),
        "python": python,
        "numpy": numpy,
        "kernel": platform.release(),
        "machine": f"{platform.machine()} {cpu.partition(': ')[2]}".strip(),
        "cpus": str(os.cpu_count()),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / GiB:.0f} GiB",
        "file system": file_system,
    }


def git_commit(directory: Path) -> str:
    done = (
        subprocess.run(
            ["git", "-C", directory, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
        )
        if shutil.which("git")
        else None
    )
    return done.stdout.strip() if done and not done.returncode else "unknown"
