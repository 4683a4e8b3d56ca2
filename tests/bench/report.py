"""Tables of results: for the terminal, and README's."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from bench import ratios
from bench.results import Results
from bench.rows import CONTENDERS, OURS, QEMU, QEMUS, GiB, MiB, Row, Sample
from bench.servers import BenchError

BEGIN = "<!-- bench -->"
END = "<!-- /bench -->"
LIMITS = (
    "The last two columns tell where the limits are. Plain Python is a plugin that calls `os.preadv`, `os.pwrite` "
    "and `os.fdatasync` and does nothing else. nbdkit alone is its null plugin, which is in C and does nothing; for "
    "extents and scattered data its sparse-random plugin, with as many."
)


def median(samples: Sequence[Sample], figure: ratios.Figure) -> float:
    return statistics.median(map(figure, samples))


def terminal(results: Results) -> str:
    """One line per row and contender: medians, and the median of the ratios within each round."""
    head = f"{'':18} {'req/s or s':>10} {'MiB/s':>7} {'p50 us':>8} {'p99 us':>8}"
    lines = [f"{head} {'CPU s/100k':>10} {'CPU s/GiB':>9} {'RSS MiB':>8} {'qed is':>8}"]
    for row in results.measured_rows(False) + results.measured_rows(True):
        lines.append(row.title)
        for contender in CONTENDERS:
            mine = ratios.of(results.samples, row.name, contender)
            if mine:
                factor = None if contender == OURS else ratios.ratio(results.samples, row.name, [contender])
                lines.append(f"  {contender:17}{figures(row, mine)} {times(factor)}".rstrip())
        best = ratios.to_best(results.samples, row.name)
        if best is not None:
            lines.append(f"  {'best qemu-nbd':17}{'':66} {times(best)}")
    lines += [f"failed, and tried again: {failure}" for failure in results.failures]
    lines += [f"left out: {what}: {why}" for what, why in results.left_out.items()]
    return "\n".join(lines)


def figures(row: Row, samples: Sequence[Sample]) -> str:
    def cell(width: int, value: float | None, digits: int = 0) -> str:
        return f"{'' if value is None else f'{value:,.{digits}f}':>{width}}"

    requests, moved = samples[0].requests, samples[0].bytes
    first = median(samples, lambda s: s.seconds) if row.timed else median(samples, lambda s: s.speed)
    return " ".join(
        (
            cell(11, first, 3 if row.timed else 0),
            cell(7, median(samples, lambda s: s.bytes / s.seconds / MiB) if moved else None),
            cell(8, median(samples, lambda s: s.p50_us) if requests else None),
            cell(8, median(samples, lambda s: s.p99_us) if requests else None),
            cell(10, median(samples, lambda s: s.cpu * 100_000 / s.requests) if requests else None, 2),
            cell(
                9, median(samples, lambda s: s.cpu * GiB / s.bytes) if moved else median(samples, lambda s: s.cpu), 2
            ),
            cell(8, max(s.rss for s in samples) / MiB),
        )
    )


def times(factor: float | None) -> str:
    return "" if factor is None else f"{factor:7.2f}x"


# -- README -----------------------------------------------------------------------------------------


def short(factor: float | None) -> str:
    """Two digits."""
    if factor is None:
        return ""
    return f"{factor:.0f}" if factor >= 9.95 else f"{factor:.1f}" if factor >= 0.995 else f"{factor:.2f}"


def table(results: Results) -> list[str]:
    columns = ratios.RIVALS + ratios.LIMITS
    lines = ["| work | qemu-nbd | best qemu-nbd | file plugin, raw | plain Python, raw | nbdkit alone |"]
    lines.append("|---" * (1 + len(columns)) + "|")
    for row in results.measured_rows(scale=False):
        cells = [short(column(results.samples, row.name, ratios.speed)) for column in columns]
        lines.append(f"| {row.title} | {' | '.join(cells)} |")
    cells = [short(worst_memory(results, column)) for column in columns]
    if any(cells):
        lines.append(f"| peak memory of the server, the worst of these | {' | '.join(cells)} |")
    return lines


def worst_memory(results: Results, column: ratios.Column) -> float | None:
    found = [
        column(results.samples, row.name, ratios.frugality)
        for row in results.measured_rows(scale=False)
        if row.work != "check"  # no server
    ]
    return min((factor for factor in found if factor is not None), default=None)


def readme_part(results: Results, chart: str) -> str:
    """What goes between the two marks.  chart: its path, relative to README."""
    env = results.environment
    machine = f"{env['cpus']} CPUs, {env['memory']}, {env['file system']}"
    linux = str(env["kernel"]).partition("-")[0]
    versions = f"QEMU {env['qemu']}, nbdkit {env['nbdkit']}, Linux {linux}"
    text = f"Ratios of medians, measured on {env['date']} with {versions} ({machine}); above 1 favours this plugin."
    measured = {s.contender for s in results.samples}
    best = " and ".join(f"`{name}`" for name in qemu_options(measured))
    if best:
        text += f" Best is the better of {best} in each round."
    paragraphs = [text, "\n".join(table(results)), LIMITS]
    if chart:
        paragraphs.append(f"![Ratios and scale]({chart})")
    return "\n\n".join(paragraphs)


def qemu_options(measured: set[str]) -> list[str]:
    options = {QEMU: "--aio=threads", QEMUS[1]: "--aio=threads", QEMUS[2]: "--aio=io_uring"}
    found = sorted({options[name] for name in QEMUS if name in measured}, reverse=True)
    return found if len(found) > 1 else []


def replace_part(readme: Path, part: str) -> None:
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise BenchError(f"{readme}: {BEGIN} and {END} must mark the place of the table")
    readme.write_text(f"{before}{BEGIN}\n{part}\n{END}{after}", encoding="utf-8")
