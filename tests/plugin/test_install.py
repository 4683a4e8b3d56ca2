"""make install: what it puts where, that it works from there, and that make uninstall takes all of it away."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from support.patterns import MiB, assert_same, stamp
from support.qed_image import Built, assert_sound
from support.server import import_nbd
from support.tools import REPO, Result, require, run, run_ok, unavailable


def make(target: str, variables: Mapping[str, object]) -> Result:
    require("make", "pod2man", "nbdkit")
    # As from a shell, also when make runs the tests.
    env = dict.fromkeys(("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES"), "")
    return run(["make", "-C", REPO, target, *[f"{name}={value}" for name, value in variables.items()]], env=env)


def files(directory: Path) -> set[str]:
    found = {path for path in directory.rglob("*") if not path.is_dir() or path.is_symlink()}
    return {str(path.relative_to(directory)) for path in found}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with prefix/ and plugins/."""
    top = tmp_path_factory.mktemp("a place")
    result = make("install", {"PREFIX": top / "prefix", "PLUGINDIR": top / "plugins"})
    assert result.rc == 0, result.text
    return top


def other_nbdkit(top: Path) -> Path:
    """nbdkit with another plugin directory: a copy of the program with the path in it replaced, as long as it was.

    That directory is compiled in, and only root may write to the real one.
    """
    config = dict(line.split("=", 1) for line in run_ok(["nbdkit", "--dump-config"]).splitlines())
    old = os.fsencode(config["plugindir"])
    program = Path(config["binary"]).read_bytes()
    shorter = Path(f"/tmp/qed-{os.getpid()}")
    if program.count(old + b"\0") != 1 or len(str(shorter)) > len(old):
        unavailable("this nbdkit's plugin directory cannot be replaced")
    shorter.symlink_to(top / "plugins")
    changed = top / "nbdkit"
    changed.write_bytes(program.replace(old + b"\0", os.fsencode(shorter).ljust(len(old), b"/") + b"\0"))
    changed.chmod(0o755)
    return changed


def test_nbdkit_finds_the_plugin_by_its_name(installed: Path, image: Callable[..., Built]) -> None:
    built = image(layout="DZ-D", size=MiB)
    nbdkit = other_nbdkit(installed)
    link = Path(f"/tmp/qed-{os.getpid()}")
    try:
        client = import_nbd().NBD()
        client.connect_command([str(nbdkit), "-s", "--exit-with-parent", "qed", f"file={built.path}"])
        assert_same(client.pread(MiB, 0), built.read(0, MiB))
        client.pwrite(stamp(3, 0, 4096), 8 * 64 * 1024)
        client.shutdown()
        del client
        assert_sound(built.path)
        fields = run_ok([nbdkit, "--dump-plugin", "qed"], cwd="/")
        assert f"qed_path={installed.resolve()}/prefix/share/qed/plugin/qed.py\n" in fields
        refused = run([nbdkit, "-U", "-", "qed", "file=nowhere.qed", "--run", "true"])
        assert refused.rc == 1 and len(refused.err.splitlines()) == 1 and "nowhere.qed" in refused.err
    finally:
        link.unlink()


def test_the_plugin_is_a_program(installed: Path, image: Callable[..., Built]) -> None:
    """Installed anywhere, without root."""
    built = image(layout="D", size=MiB)
    plugin = installed / "plugins" / "nbdkit-qed-plugin"
    command = [plugin, "-r", "-U", "-", f"file={built.path}", "--run", 'nbdcopy "$uri" copy.raw']
    run_ok(command, cwd=built.path.parent)
    assert_same((built.path.parent / "copy.raw").read_bytes(), built.read(0, MiB))


def test_the_script_in_the_checkout_is_a_program(image: Callable[..., Built]) -> None:
    built = image(size=MiB)
    out = run_ok([REPO / "plugin" / "qed.py", "-U", "-", f"file={built.path}", "--run", 'nbdinfo --size "$uri"'])
    assert out.strip() == str(MiB)


def test_the_command(installed: Path, image: Callable[..., Built], tmp_path: Path) -> None:
    import qedcore

    built = image(layout="DZ-D", size=MiB)
    qed = installed / "prefix" / "bin" / "qed"
    assert run_ok([qed, "--version"], cwd="/").split()[-1] == qedcore.__version__
    assert run([qed, "check", built.path], cwd="/").rc == 0
    if shutil.which("qemu-img"):
        # needs the plugin, too
        run_ok([qed, "convert", "-O", "qcow2", built.path, tmp_path / "x.qcow2"], cwd="/")
        run_ok(["qemu-img", "compare", built.path, tmp_path / "x.qcow2"])


def test_a_package_is_staged(tmp_path: Path) -> None:
    """DESTDIR: everything is below it, and nothing remembers it."""
    stage = tmp_path / "stage"
    variables = {"DESTDIR": stage, "PREFIX": "/opt/qed", "PLUGINDIR": "/opt/nbdkit/plugins"}
    result = make("install", variables)
    assert result.rc == 0, result.text
    found = files(stage)
    modules = {path.relative_to(REPO) for path in (REPO / "qedcore").rglob("*.py")}
    assert found - {name for name in found if "__pycache__" in name} == {
        "opt/nbdkit/plugins/nbdkit-qed-plugin",
        "opt/qed/bin/qed",
        "opt/qed/share/qed/plugin/qed.py",
        "opt/qed/share/man/man1/qed.1",
        "opt/qed/share/man/man1/nbdkit-qed-plugin.1",
        "opt/qed/share/bash-completion/completions/qed",
        *(f"opt/qed/share/qed/{module}" for module in modules),
    }
    assert os.readlink(stage / "opt/nbdkit/plugins/nbdkit-qed-plugin") == "/opt/qed/share/qed/plugin/qed.py"
    naming = [n for n in found if not (stage / n).is_symlink() and os.fsencode(tmp_path) in (stage / n).read_bytes()]
    assert not naming
    assert os.fsencode(REPO) not in b"".join((stage / n).read_bytes() for n in found if not (stage / n).is_symlink())
    for name in ("qed", "nbdkit-qed-plugin"):
        page = (stage / f"opt/qed/share/man/man1/{name}.1").read_text()
        assert f".TH {name.upper()} 1" in page.replace('"', "")
    for _ in range(2):  # a second time there is nothing to take away
        result = make("uninstall", variables)
        assert result.rc == 0, result.text
    assert files(stage) == set()
    assert not (stage / "opt/qed/share/qed").exists()


def test_installing_again_replaces(tmp_path: Path) -> None:
    variables = {"PREFIX": tmp_path / "p", "PLUGINDIR": tmp_path / "plugins"}
    for _ in range(2):
        result = make("install", variables)
        assert result.rc == 0, result.text
    assert (tmp_path / "p/bin/qed").exists()


def test_completion_is_for_the_command(installed: Path) -> None:
    script = installed / "prefix" / "share" / "bash-completion" / "completions" / "qed"
    assert run_ok(["bash", "-c", 'source "$0" && complete -p qed', script]).strip() == "complete -F _qed qed"


def test_no_plugin_directory_is_one_line(tmp_path: Path) -> None:
    result = make("install", {"PREFIX": tmp_path, "PLUGINDIR": ""})
    assert result.rc != 0 and "PLUGINDIR= is needed" in result.err
    assert files(tmp_path) == set()
