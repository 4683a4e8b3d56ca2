#!/usr/bin/python3
"""Compare servers of QED images, in alternation.

In every round of a row each contender gets one run: a server is started, a client measures it, the
server ends.  The order rotates from round to round, so that drift of the machine hits all alike;
ratios are taken within a round and the median of them is printed.  Ratios above 1 favour the QED
plugin.

    qed                the plugin, on a QED image; for the row "check", the command
    qemu-nbd           QEMU's driver, on the same image, with its defaults; or qemu-img check
    qemu-nbd-io_uring  the same with --aio=io_uring
    qemu-nbd-threads   the same with --aio=threads, for a QEMU with another default (only with --only)
    nbdkit-file        nbdkit's file plugin, on a raw file of the same content
    nbdkit-alone       nbdkit's null plugin, in C, which does nothing: what the others could reach at best; for
                       images of many extents its sparse-random plugin, which has as many
    nbdkit-python      a plugin in Python that serves a raw file and does nothing else: what Python costs

Images that are read are in the page cache, those that are written to are new in each run.  In the
first round of each row it is proven, apart from the measurement, that the run did what the row says:
copies equal the source, allocating writes allocate and overwrites do not, and so on.

--scale measures the curves instead: cost per request against size and fill of the image, connections,
start, and a long run.  --report makes README's table and the chart from files written by --json.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import report, results, servers
from bench.clients import Client, allocated, import_nbd
from bench.images import SHARED, Images, Sizes, say
from bench.results import Results
from bench.rows import (
    CONTENDERS,
    DEFAULT_CONTENDERS,
    FLOOR,
    OURS,
    PLAIN,
    QEMU_IO_URING,
    QEMUS,
    RAW,
    ROWS,
    GiB,
    KiB,
    Measured,
    MiB,
    Row,
    Sample,
    TiB,
    amount,
    scale_rows,
)
from bench.servers import BenchError, NotHere, Server, run

TOP = Path(__file__).resolve().parents[2]
PLUGIN = TOP / "plugin" / "qed.py"
README = TOP / "README.md"
TRIES = 3  # of a run: qemu-nbd fails an assertion of its own now and then
CHART = Path(__file__).with_name("results.svg")


class Bench:
    """A run of the benchmark: its settings and what it has found so far."""

    def __init__(self, options: argparse.Namespace, rows: Sequence[Row]) -> None:
        self.options = options
        size_names = {"image": amount(options.image_size), "huge": amount(options.huge_size)}
        self.rows = [dataclasses.replace(row, title=row.title.format(**size_names)) for row in rows]
        self.contenders: list[str] = [c for c in CONTENDERS if c in (options.only or DEFAULT_CONTENDERS)]
        settings = {k: getattr(options, k) for k in ("rounds", "seconds", "long_seconds", "threads", "param")}
        sizes = dataclasses.asdict(self._sizes())
        self.results = Results(self.rows, settings={**settings, "sizes": sizes})

    def _sizes(self) -> Sizes:
        o = self.options
        return Sizes(full=o.image_size, backing=o.backing_size, empty=o.empty_size, huge=o.huge_size)

    def run(self) -> None:
        require_tools(self.contenders)
        with contextlib.ExitStack() as stack:
            # The socket's path must be short; the images may want another file system.
            self._tmp = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qedbench.", dir="/tmp")))
            self._dir = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="qedbench.", dir=self.options.dir))
            )
            home = in_memory(self.options.image_size) or self.options.dir
            copies = stack.enter_context(tempfile.TemporaryDirectory(prefix="qedbench.", dir=home))
            self._target = Path(copies) / "target.raw"
            self.images = Images(self._dir, self._sizes())
            self.results.environment = results.environment(self._dir, self.options.plugin)
            stack.callback(self._finish)  # also after an error or Ctrl-C
            self._leave_out_what_does_not_work()
            for number, row in enumerate(self.rows):
                self._measure_row(row)
                for kind in {row.image} - {later.image for later in self.rows[number + 1 :]} - {"full"}:
                    self.images.forget("backing" if kind == "overlay" else kind)

    def _finish(self) -> None:
        if self.results.samples:
            print(f"\n{report.terminal(self.results)}")
            if self.options.json:
                self.results.save(self.options.json)

    @property
    def complete(self) -> bool:
        """The plugin was measured in every row that can run here."""
        measured = {s.row for s in self.results.samples if s.contender == OURS}
        missing = {row.name for row in self.rows} - measured - self.results.left_out.keys()
        return OURS not in self.contenders or not missing

    def _leave_out(self, what: str, why: object) -> None:
        say(f"leaving out {what}: {why}")
        self.results.left_out[what] = str(why)

    def _leave_out_what_does_not_work(self) -> None:
        """io_uring may be forbidden, or QEMU be built without it."""
        if QEMU_IO_URING not in self.contenders:
            return
        image, address = self._dir / "probe.qed", self._tmp / "sock"
        run("qemu-img", "create", "-q", "-f", "qed", image, str(MiB))
        try:
            command = self._command(QEMU_IO_URING, self.rows[0], image, address)
            with Server(command, address, self._tmp / "log") as server:
                server.wait()
        except BenchError:
            self._leave_out(QEMU_IO_URING, server.log())
            self.contenders.remove(QEMU_IO_URING)

    def _measure_row(self, row: Row) -> None:
        try:
            require_for(row)
            if row.image in SHARED:
                self.images.shared(row.image)
        except NotHere as e:
            self._leave_out(row.name, e)
            return
        taking_part = [c for c in self.contenders if row.takes_part(c)]
        rounds = 1 if row.slices else self.options.rounds
        for round_ in range(rounds):
            say(f"{row.title}: round {round_ + 1} of {rounds}")
            for turn in range(row.repeat):
                start = (round_ * row.repeat + turn) % max(1, len(taking_part))
                for contender in taking_part[start:] + taking_part[:start]:
                    try:
                        sample = self._try(row, contender, round_, prove=not round_ and not turn)
                    except BenchError as e:
                        # What was measured of it before stays.
                        self._leave_out(f"{row.name}, {contender}", e)
                        taking_part.remove(contender)
                    else:
                        self.results.samples.append(sample)

    def _try(self, row: Row, contender: str, round_: int, prove: bool) -> Sample:
        for _ in range(TRIES - 1):
            try:
                return self._measure(row, contender, round_, prove)
            except NotHere:
                raise
            except BenchError as e:
                say(f"{contender}, to be tried again: {e}")
                self.results.failures.append(f"{row.name}, {contender}: {e}")
        return self._measure(row, contender, round_, prove)

    def _command(self, contender: str, row: Row, image: Path | str, address: Path) -> list[str]:
        o = self.options
        return servers.command(contender, row, image, self.images.size(row), address, o.threads, o.plugin, o.param)

    def _image(self, row: Row, contender: str) -> contextlib.AbstractContextManager[Path]:
        if contender == FLOOR:
            return contextlib.nullcontext(Path(os.devnull))
        return self.images.for_run(row, "raw" if contender in (RAW, PLAIN) else "qed")

    @contextlib.contextmanager
    def _place(self, row: Row, image: Path) -> Iterator[Path | str]:
        """Where the server finds the image: its path, or its URI on another server."""
        if not row.remote:
            yield image
            return
        address = self._tmp / "back"
        with Server(
            ["nbdkit", "-f", "-U", str(address), "file", str(image)], address, self._tmp / "back.log"
        ) as server:
            server.wait()
            yield server.uri

    def _measure(self, row: Row, contender: str, round_: int, prove: bool) -> Sample:
        seconds = self.options.long_seconds if row.slices else self.options.seconds
        client = Client(row, contender, self.images, self._tmp, self._target, self.options.plugin, seconds, round_)
        address = self._tmp / "sock"

        def sample(measured: Measured, cpu: float, rss: int) -> Sample:
            return Sample(**vars(measured), row=row.name, contender=contender, round=round_, cpu=cpu, rss=rss)

        with self._image(row, contender) as image, self._place(row, image) as place:
            if row.work == "check":
                return sample(*client.check(image))
            prove &= contender != FLOOR
            before = allocated(image) if prove and row.writes else 0
            with Server(self._command(contender, row, place, address), address, self._tmp / "log") as server:
                try:
                    cpu = 0.0
                    if row.work != "open":
                        server.wait()
                        cpu = server.cpu_seconds()
                    measured = client.measure(server)
                    cpu, rss = server.cpu_seconds() - cpu, server.peak_rss()
                    if prove:
                        client.prove_served(server)
                except (BenchError, OSError) as e:
                    raise BenchError(f"{e}; the server's log: {server.log()}") from e
                finally:
                    self._target.unlink(missing_ok=True)
            if prove:
                client.prove_image(image, measured, before)
        return sample(measured, cpu, rss)


def in_memory(size: int) -> Path | None:
    """A directory in memory with room for `size` bytes: how fast a disk takes a copy is no server's merit."""
    memory = Path("/dev/shm")
    try:
        space = os.statvfs(memory)
    except OSError:
        return None
    room = space.f_bavail * space.f_frsize > 1.25 * size
    return memory if room and os.access(memory, os.W_OK) else None


def require_tools(contenders: Sequence[str]) -> None:
    """Raises BenchError if a program is missing that the contenders need."""
    needed = ["fio", "qemu-img"]
    if set(QEMUS) & set(contenders):
        needed.append("qemu-nbd")
    if {OURS, RAW, FLOOR, PLAIN} & set(contenders):
        needed.append("nbdkit")
    missing = [tool for tool in needed if shutil.which(tool) is None]
    if missing:
        raise BenchError(f"not installed: {', '.join(missing)}")
    if "nbd" not in run("fio", "--enghelp").split():
        raise BenchError("this fio has no nbd engine (it may be a package of its own, such as fio-engine-nbd)")
    formats = run("qemu-img", "--help").rpartition("Supported formats:")[2].split()
    if "qed" not in formats:
        raise BenchError("this qemu-img has no QED driver, which makes the images and is what we compare with")


def require_for(row: Row) -> None:
    """Raises NotHere if something is missing that only this row needs."""
    tool = {"copy-out": "nbdcopy", "copy-in": "nbdcopy", "map": "nbdinfo"}.get(row.work)
    if tool and shutil.which(tool) is None:
        raise NotHere(f"{tool} is not installed")
    if row.work == "open":
        import_nbd()


# -- command line -----------------------------------------------------------------------------------


def size(text: str) -> int:
    units = {"K": KiB, "M": MiB, "G": GiB, "T": TiB}
    number, unit = (text[:-1], units[text[-1].upper()]) if text[-1:].upper() in units else (text, 1)
    value = int(number) * unit
    if value <= 0 or value % MiB:
        raise ValueError
    return value


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def duration(text: str) -> float:
    value = float(text)
    if not value >= 0.01:
        raise ValueError
    return value


def names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    rows = ", ".join(row.name for row in ROWS)
    curves = ", ".join(dict.fromkeys(row.curve for row in scale_rows()))
    add("--rows", type=names, metavar="NAME,...", help=f"some of: {rows}; with --scale of: {curves} (default: all)")
    add("--only", type=names, metavar="NAME,...", help="only these contenders")
    add("--scale", action="store_true", help="measure the scale curves instead of the table")
    add("--rounds", type=positive, help="runs of each contender per row (default 5; with --scale 3)")
    add("--seconds", type=duration, default=2, help="at most, per run of fio (default 2)")
    add(
        "--long-seconds",
        type=duration,
        default=60,
        metavar="SECONDS",
        help="of the long runs, one each (default 60)",
    )
    add("--threads", type=positive, default=16, help="nbdkit's -t (default 16, as nbdkit's)")
    add("--plugin", type=Path, default=PLUGIN, help="another plugin/qed.py to measure")
    add("--param", action="append", default=[], metavar="KEY=VALUE", help="plugin parameter")
    sizes = Sizes()
    for option, default, what in (
        ("--image-size", sizes.full, "of the full image"),
        ("--backing-size", sizes.backing, "of the backing file"),
        ("--empty-size", sizes.empty, "of empty images"),
        ("--huge-size", sizes.huge, "of the images of which only the tables matter"),
    ):
        add(option, type=size, default=default, metavar="SIZE", help=f"{what} (default {amount(default)})")
    add("--dir", type=Path, help="where the images go (default: the temporary directory)")
    add("--json", type=Path, metavar="OUT", help="write every sample to this file")
    add("--report", type=Path, nargs="+", metavar="RESULTS", help="measure nothing: README's table and the chart")
    add("--readme", type=Path, default=README, help=argparse.SUPPRESS)
    add("--chart", type=Path, default=CHART, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.rounds = options.rounds or (3 if options.scale else 5)
    known = [row.name for row in ROWS]
    if options.scale:
        known = [name for row in scale_rows() for name in (row.curve, row.name)]
    for given, possible in ((options.rows, known), (options.only, CONTENDERS)):
        for name in given or ():
            if name not in possible:
                parser.error(f"{name}: not one of {', '.join(possible)}")
    return options


def chosen_rows(options: argparse.Namespace) -> list[Row]:
    rows = scale_rows() if options.scale else list(ROWS)
    return [row for row in rows if not options.rows or {row.name, row.curve} & set(options.rows)]


def make_report(options: argparse.Namespace) -> None:
    found = results.load(options.report)
    try:
        from bench import chart
    except ImportError as e:
        say(f"no chart: {e}")
        path = ""
    else:
        chart.draw(found, options.chart)
        path = os.path.relpath(options.chart, options.readme.parent)
    report.replace_part(options.readme, report.readme_part(found, path))


def terminated(signum: int, frame: FrameType | None) -> None:
    sys.exit(128 + signum)


def main(argv: Sequence[str]) -> int:
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # users' Python compiles a module once
    options = parse(argv)
    try:
        if options.report:
            make_report(options)
            return 0
        benchmark = Bench(options, chosen_rows(options))
        benchmark.run()
    except BenchError as e:
        say(f"bench: {e}")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0 if benchmark.complete else 1


if __name__ == "__main__":
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, terminated)
    sys.exit(main(sys.argv[1:]))
