"""The layers of the engine: every import goes to a lower one, and nothing is loaded that is not needed."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "qedcore"

# Lowest first.  A module may import those of packages of lower layers, and of its own: there without a circle.
LAYERS = (
    ("the top",),
    ("storage",),
    ("format", "backing"),
    ("check",),
    ("engine",),
    ("maintenance",),
    ("library",),
    ("__init__",),  # the public names
    ("server", "cli"),
    ("__main__",),
)
RANKS = {package: rank for rank, packages in enumerate(LAYERS) for package in packages}

# Modules outside of packages that all of them may import.
TOP = ("errors", "locks", "trace", "units")

# Used where installed, never needed.
OPTIONAL = {"check.scan_numpy": {"numpy"}, "storage.nbd_link": {"nbd"}}


class Edge(NamedTuple):
    source: str
    target: str
    late: bool  # inside a function
    line: int


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if len(parts) > 1 and parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts)


def package(module: str) -> str:
    return "the top" if module in TOP else module.partition(".")[0]


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(name: str) -> Iterator[tuple[str, bool, int]]:
    """(imported module or attribute in absolute form, inside a function, line)."""
    path = MODULES[name]
    parents = ["qedcore", *path.relative_to(PACKAGE).parts[:-1]]
    todo: list[tuple[ast.AST, bool]] = [(ast.parse(path.read_text()), False)]
    while todo:
        node, late = todo.pop()
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, late, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            for alias in node.names:
                yield ".".join([*base, alias.name]), late, node.lineno
        inner = late or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        todo += [(child, inner) for child in ast.iter_child_nodes(node)]


@cache
def edges() -> tuple[Edge, ...]:
    return tuple(find_edges())


def find_edges() -> Iterator[Edge]:
    for source in MODULES:
        for target, late, line in imports(source):
            words = target.split(".")
            if words[0] != "qedcore":
                continue
            # the longest prefix that is a module; its own name for "from .module import name"
            for n in range(len(words), 0, -1):
                found = ".".join(words[1:n]) or "__init__"
                if found in MODULES:
                    yield Edge(source, found, late, line)
                    break
            else:
                raise AssertionError(f"{source}: cannot resolve {target}")


def test_every_package_has_a_layer() -> None:
    assert {package(module) for module in MODULES} == set(RANKS)


def test_edges_are_found() -> None:
    found = {(edge.source, edge.target) for edge in edges()}
    assert {("trace", "errors"), ("storage.direct", "storage"), ("storage.direct", "errors")} <= found
    late, typing_only = ("__main__", "cli.main"), ("server.parameters", "trace")
    assert {late, typing_only, ("engine.chain", "engine.traced")} <= found


@pytest.mark.parametrize("source", sorted(MODULES))
def test_imports_go_down(source: str) -> None:
    wrong = []
    for edge in edges():
        if edge.source != source or package(edge.target) == package(source):
            continue
        if RANKS[package(edge.target)] >= RANKS[package(source)]:
            wrong.append(f"line {edge.line}: {source} imports {edge.target}")
    assert not wrong


@pytest.mark.parametrize("name", sorted(RANKS))
def test_no_circle_inside_a_package(name: str) -> None:
    graph: dict[str, set[str]] = {}
    for edge in edges():
        if package(edge.source) == package(edge.target) == name:
            graph.setdefault(edge.source, set()).add(edge.target)
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError, naming them


@pytest.mark.skipif(sys.version_info < (3, 10), reason="sys.stdlib_module_names needs Python 3.10")
@pytest.mark.parametrize("source", sorted(name for name in MODULES if package(name) != "cli"))
def test_standard_library_only(source: str) -> None:
    found = {(target.split(".")[0], late) for target, late, _ in imports(source)}
    own = {name for name, _ in found if name not in sys.stdlib_module_names} - {"qedcore"}
    assert own <= OPTIONAL.get(source, set())
    assert all(late for name, late in found if name in own)


def loaded(statement: str) -> set[str]:
    """Modules in a fresh interpreter after `statement`."""
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_serving_loads_no_more_than_it_needs() -> None:
    modules = loaded("import qedcore.server.exports, qedcore.engine.prefetch, qedcore.server.thread_state")
    assert "qedcore.engine.read" in modules
    unwanted = {"qedcore.engine.traced", "qedcore.trace", "qedcore.cli", "qedcore.storage.direct"}
    unwanted |= {"qedcore.storage.nbd", "qedcore.storage.qemu_nbd"}
    unwanted |= {"numpy", "nbd", "argparse", "json", "subprocess", "socket", "asyncio", "multiprocessing", "logging"}
    assert not modules & unwanted


# Modules whose tests need more than a unit test has (the real nbdkit, QEMU, threads that take turns), or are tested
# with the one that uses them.
ELSEWHERE = {
    "__main__": "interop/test_interrupts.py",
    "backing.foreign": "interop/test_foreign_backing.py",
    "cli.conversion": "interop/test_qed_commands.py",
    "cli.creation": "interop/test_qed_commands.py",
    "cli.foreign_image": "interop/test_qed_commands.py",
    "cli.foreign_map": "interop/test_qed_commands.py",
    "cli.images": "interop/test_qed_commands.py",
    "cli.messages": "interop/test_qed_commands.py",
    "cli.nbdkit": "interop/test_qed_commands.py",
    "engine.cluster_locks": "crash/test_cluster_locks.py",
    "engine.reclaim": "unit/engine/test_allocator.py",
    "maintenance.header_fit": "unit/maintenance/test_repair.py",
    "maintenance.layout": "unit/maintenance/test_compact.py",
    "maintenance.lost_tables": "unit/maintenance/test_repair.py",
    "server.thread_state": "plugin/test_thread_state.py",
    "storage.nbd_link": "unit/storage/test_nbd.py",
    "storage.nbd_requests": "unit/storage/test_nbd.py",
    "storage.qemu_nbd": "interop/test_foreign_backing.py",
}


def is_command(module: str) -> bool:
    """Those are tested beside qemu-img: tests/interop/test_qed_*.py."""
    return module.startswith("cli.commands.")


@pytest.mark.parametrize("module", sorted(name for name in MODULES if not is_command(name)))
def test_every_module_has_tests_of_its_name(module: str) -> None:
    if MODULES[module].name == "__init__.py":
        return
    path = Path("unit", *module.split(".")[:-1], f"test_{module.rpartition('.')[2]}.py")
    assert (ROOT / "tests" / ELSEWHERE.get(module, path)).exists(), f"tests/{path} is missing, or a line in ELSEWHERE"
    assert module not in ELSEWHERE or not (ROOT / "tests" / path).exists()
