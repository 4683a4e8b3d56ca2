"""The chart: ratios of the table's rows, and the scale curves."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from bench import ratios
from bench.report import short
from bench.results import Results
from bench.rows import CONTENDERS, FLOOR, OURS, PLAIN, QEMU, QEMU_IO_URING, QEMU_THREADS, RAW, Row, Sample, amount

INK, FAINT = "#333333", "#dddddd"
COLOURS = {
    OURS: "#1764ab",
    QEMU: "#d9661f",
    QEMU_THREADS: "#b8860b",
    QEMU_IO_URING: "#e9b44c",
    RAW: "#7f7f7f",
    FLOOR: "#bdbdbd",
    PLAIN: "#dbdb8d",
}
NAMES = {
    OURS: "this plugin",
    QEMU: "qemu-nbd",
    QEMU_THREADS: "qemu-nbd --aio=threads",
    QEMU_IO_URING: "qemu-nbd --aio=io_uring",
    RAW: "nbdkit's file plugin, raw",
    FLOOR: "nbdkit alone",
    PLAIN: "a plain Python plugin, raw",
}
# As ratios.RIVALS
BARS = (("to qemu-nbd", COLOURS[QEMU]), ("to the best qemu-nbd", COLOURS[QEMU_IO_URING]), ("to raw", COLOURS[RAW]))
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "qed",  # the same results give the same file
}

BAR = 0.28  # of the height of a row
Cost = Callable[[Sample], float]


def microseconds(sample: Sample) -> float:
    return 1e6 / sample.speed


def milliseconds(sample: Sample) -> float:
    return sample.seconds * 1000


def thousands(sample: Sample) -> float:
    return sample.speed / 1000


# Curve: title, label of x, label of y, y of a sample, logarithmic y
PANELS: dict[str, tuple[str, str, str, Cost, bool]] = {
    "size-read": ("Random read, 20 places", "image size", "µs per request", microseconds, True),
    "size-read-all": ("Random read, whole image", "image size", "µs per request", microseconds, True),
    "size-write": ("Allocating write, 20 places", "image size", "µs per request", microseconds, True),
    "fill-read": ("Random read", "% of the clusters allocated", "µs per request", microseconds, False),
    "fill-write": ("Allocating write", "% of the clusters allocated", "µs per request", microseconds, False),
    "connections": ("Random read", "connections", "thousand requests/s", thousands, False),
    "start": ("Open to first byte", "image size", "ms", milliseconds, True),
    "long-read": ("Random read, long run", "seconds", "thousand requests/s", thousands, False),
    "long-write": ("Allocating write, long run", "seconds", "thousand requests/s", thousands, False),
}
COLUMNS = 3


def draw(results: Results, path: Path) -> None:
    """Write the chart; its suffix tells the format."""
    rows = results.measured_rows(scale=False)
    points = results.measured_rows(scale=True)
    curves = [curve for curve in PANELS if any(row.curve == curve for row in points)]
    lines = -(-len(curves) // COLUMNS)
    heights = [0.9 + 0.36 * len(rows)] * bool(rows) + [0.6 + 2.3 * lines] * bool(lines)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, sum(heights)), layout="constrained")
        parts = list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
        if rows:
            draw_ratios(parts[0].add_subplot(), results, rows)
        if curves:
            draw_curves(parts[-1], results, curves, points)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {})


def draw_curves(figure: Any, results: Results, curves: list[str], points: list[Row]) -> None:
    drawn: dict[str, Any] = {}
    for number, curve in enumerate(curves):
        axes = figure.add_subplot(-(-len(curves) // COLUMNS), COLUMNS, number + 1)
        drawn.update(draw_curve(axes, results, curve, [row for row in points if row.curve == curve]))
    shown = [contender for contender in CONTENDERS if contender in drawn]
    handles, labels = [drawn[c] for c in shown], [NAMES[c] for c in shown]
    figure.legend(handles, labels, loc="outside upper center", ncols=len(shown), frameon=False)


def draw_ratios(axes: Any, results: Results, rows: list[Row]) -> None:
    found = [[column(results.samples, row.name, ratios.speed) for column in ratios.RIVALS] for row in rows]
    for position, factors in enumerate(found):
        given = [(factor, colour) for factor, (_, colour) in zip(factors, BARS) if factor]
        for n, (factor, colour) in enumerate(given):
            y = position + (n - (len(given) - 1) / 2) * BAR
            axes.barh(y, factor - 1, BAR * 0.92, left=1, color=colour)
            to_the_right = factor >= 1
            axes.annotate(
                short(factor),
                (factor, y),
                xytext=(3 if to_the_right else -3, 0),
                textcoords="offset points",
                ha="left" if to_the_right else "right",
                va="center_baseline",
                fontsize=7,
            )
    every = [factor for factors in found for factor in factors if factor]
    low, high = min([*every, 0.8]), max([*every, 1.25])
    axes.set_xscale("log")
    axes.set_xlim(low / 1.25, high * 1.25)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [row.title for row in rows])
    axes.tick_params(axis="y", length=0)
    ticks = [n for n in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low / 1.25 < n < high * 1.25]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.axvline(1, color=INK, linewidth=1.2)
    axes.spines["left"].set_visible(False)
    axes.set_title("Speed of this plugin in proportion to the others; right of 1, it is faster")
    shown = [bar for n, bar in enumerate(BARS) if any(factors[n] for factors in found)]
    handles = [Patch(color=colour) for _, colour in shown]
    axes.legend(
        handles, [name for name, _ in shown], loc="lower right", frameon=True, framealpha=0.9, edgecolor="none"
    )


def draw_curve(axes: Any, results: Results, curve: str, rows: list[Row]) -> dict[str, Any]:
    """The lines by contender."""
    title, x_label, y_label, cost, logarithmic = PANELS[curve]
    drawn = {}
    for contender in reversed(CONTENDERS):  # ours on top
        if rows[0].slices:
            xs, ys = slices(ratios.of(results.samples, rows[0].name, contender))
        else:
            by_x = {row.x: ratios.of(results.samples, row.name, contender) for row in rows}
            xs = [x for x, samples in by_x.items() if samples]
            ys = [statistics.median(map(cost, by_x[x])) for x in xs]
        if xs:
            style = {"linewidth": 2.2 if contender == OURS else 1.4, "linestyle": "--" if contender == FLOOR else "-"}
            marker = "" if rows[0].slices else "o"
            (drawn[contender],) = axes.plot(xs, ys, marker=marker, markersize=3.5, color=COLOURS[contender], **style)
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    plain = FuncFormatter(lambda value, _: f"{value:,g}")
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(plain)
    if x_label == "image size":
        axes.set_xscale("log", base=2)
        axes.set_xticks([row.x for row in rows], [amount(round(row.x)).replace(" ", "\n") for row in rows])
        axes.xaxis.set_minor_locator(NullLocator())
    elif not rows[0].slices:
        axes.set_xticks([row.x for row in rows])
    return drawn


def slices(samples: list[Sample]) -> tuple[list[float], list[float]]:
    """Seconds and thousands of requests per second: the median run, slice by slice."""
    samples = [sample for sample in samples if sample.slices]
    if not samples:
        return [], []
    n = min(len(sample.slices) for sample in samples)
    width = statistics.median(sample.seconds / len(sample.slices) for sample in samples)
    ys = [statistics.median(sample.slices[i] for sample in samples) / 1000 for i in range(n)]
    return [(i + 0.5) * width for i in range(n)], ys
