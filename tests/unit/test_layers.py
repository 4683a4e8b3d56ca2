"""The layers of the engine: every import goes to a lower one, and nothing is loaded that is not needed."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "qedcore"

# Lowest first.  A module may import those of lower layers only; a new module gets its place here.
LAYERS = (
    ("errors",),
    ("locks", "trace", "sizes", "thread_state", "affinity", "free", "in_flight"),
    ("geometry", "storage", "cluster_use"),
    ("storage.flush", "storage.lock", "storage.ranges", "storage.nbd_link"),
    ("storage.file", "storage.nbd"),
    ("storage.direct", "storage.qemu_nbd"),
    ("header", "rehearsal", "backing"),
    ("table", "new_image"),
    ("l2_cache", "past_end", "runs"),
    ("cluster", "alloc", "quick_look"),
    ("scan",),
    ("claims", "fixed_size"),
    ("request", "trial", "check"),
    ("write",),
    ("image", "prefetch"),
    ("instrument", "compact"),  # instrument: traced children of all the classes below it
    ("chain", "resize", "repair", "salvage"),
    ("shared", "parameters", "commit", "rebase", "formats", "__init__"),
    ("exports",),  # all that a server needs
    ("cli.*",),  # among themselves: no cycles
    ("cli",),
    ("__main__",),
)
EXACT = {module: rank for rank, modules in enumerate(LAYERS) for module in modules}

# Upwards, but only when called: the opener knows the storages that build on it.
LATE = {("storage.file", "storage.direct"), ("storage.file", "storage.nbd")}

# Used where installed, never needed.
OPTIONAL = {"quick_look": {"numpy"}, "storage.nbd_link": {"nbd"}}


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


def rank(module: str) -> int:
    found = EXACT.get(module, EXACT.get(module.rpartition(".")[0] + ".*"))
    assert found is not None, f"{module} has no place in LAYERS"
    return found


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(name: str) -> Iterator[tuple[str, bool, int]]:
    """(imported module or attribute in absolute form, inside a function, line)."""
    path = MODULES[name]
    package = ["qedcore", *path.relative_to(PACKAGE).parts[:-1]]
    todo: list[tuple[ast.AST, bool]] = [(ast.parse(path.read_text()), False)]
    while todo:
        node, late = todo.pop()
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, late, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            for alias in node.names:
                yield ".".join([*base, alias.name]), late, node.lineno
        inner = late or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        todo += [(child, inner) for child in ast.iter_child_nodes(node)]


def edges() -> Iterator[Edge]:
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


def test_every_module_has_a_layer() -> None:
    for module in MODULES:
        rank(module)
    assert {module for module in EXACT if not module.endswith("*")} <= set(MODULES)


def test_edges_are_found() -> None:
    found = {(edge.source, edge.target) for edge in edges()}
    assert {("trace", "errors"), ("storage.direct", "storage"), ("storage.direct", "errors")} <= found
    assert {("chain", "instrument"), ("parameters", "trace"), ("__main__", "cli")} <= found  # late, typing only


@pytest.mark.parametrize("source", sorted(MODULES))
def test_imports_go_down(source: str) -> None:
    wrong = []
    for edge in edges():
        allowed = edge.late and (edge.source, edge.target) in LATE
        allowed = allowed or (edge.source.startswith("cli.") and edge.target.startswith("cli."))
        if edge.source == source and not allowed and rank(edge.target) >= rank(source):
            wrong.append(f"line {edge.line}: {source} ({rank(source)}) imports {edge.target} ({rank(edge.target)})")
    assert not wrong


def test_commands_have_no_cycles() -> None:
    graph: dict[str, set[str]] = {}
    for edge in edges():
        if edge.source.startswith("cli.") and edge.target.startswith("cli."):
            graph.setdefault(edge.source, set()).add(edge.target)
    assert graph
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError, naming them


def test_exceptions_are_needed() -> None:
    assert {(edge.source, edge.target) for edge in edges() if edge.late} >= LATE


@pytest.mark.skipif(sys.version_info < (3, 10), reason="sys.stdlib_module_names needs Python 3.10")
@pytest.mark.parametrize("source", sorted(name for name in MODULES if name.partition(".")[0] != "cli"))
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
    modules = loaded("import qedcore.exports, qedcore.prefetch, qedcore.thread_state")
    assert "qedcore.request" in modules
    unwanted = {"qedcore.instrument", "qedcore.trace", "qedcore.cli", "qedcore.storage.direct"}
    unwanted |= {"qedcore.storage.nbd", "qedcore.storage.qemu_nbd"}
    unwanted |= {"numpy", "nbd", "argparse", "json", "subprocess", "socket", "asyncio", "multiprocessing", "logging"}
    assert not modules & unwanted
