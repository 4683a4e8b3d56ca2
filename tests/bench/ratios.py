"""Ratios of the plugin to its rivals.  Above 1, they favour the plugin."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

from bench.rows import FLOOR, OURS, PLAIN, QEMU, QEMUS, RAW, Sample

Figure = Callable[[Sample], float]  # higher is better


def speed(sample: Sample) -> float:
    return sample.speed


def frugality(sample: Sample) -> float:
    """Higher is better: the reciprocal of the peak memory."""
    return 1 / sample.rss


def of(samples: Iterable[Sample], row: str, contender: str) -> list[Sample]:
    return [s for s in samples if s.row == row and s.contender == contender]


def round_medians(samples: Iterable[Sample], figure: Figure) -> dict[tuple[int, int], float]:
    """By run and round: the median of the figure, for rows with several runs in one round."""
    rounds: dict[tuple[int, int], list[float]] = {}
    for sample in samples:
        rounds.setdefault((sample.run, sample.round), []).append(figure(sample))
    return {key: statistics.median(values) for key, values in rounds.items()}


def ratio(
    samples: Sequence[Sample], row: str, rivals: Sequence[str], figure: Figure = speed, ours: str = OURS
) -> float | None:
    """Median, over the rounds, of our figure by that of the best rival in the same round.

    Rivals without any sample of the row are no rivals.  A round counts only if all others took part
    in it: without one of them its best would be another.  None: no such round.
    """
    mine = round_medians(of(samples, row, ours), figure)
    theirs = [found for found in (round_medians(of(samples, row, rival), figure) for rival in rivals) if found]
    rounds = set(mine).intersection(*theirs) if theirs else set()
    if not rounds:
        return None
    return statistics.median(mine[key] / max(found[key] for found in theirs) for key in sorted(rounds))


def to_qemu(samples: Sequence[Sample], row: str, figure: Figure = speed) -> float | None:
    return ratio(samples, row, [QEMU], figure)


def to_best(samples: Sequence[Sample], row: str, figure: Figure = speed) -> float | None:
    """To the best of QEMU's ways to do I/O; None if only one was measured."""
    measured = [rival for rival in QEMUS if of(samples, row, rival)]
    return ratio(samples, row, measured, figure) if len(measured) > 1 else None


def to_raw(samples: Sequence[Sample], row: str, figure: Figure = speed) -> float | None:
    return ratio(samples, row, [RAW], figure)


def to_plain(samples: Sequence[Sample], row: str, figure: Figure = speed) -> float | None:
    return ratio(samples, row, [PLAIN], figure)


def to_floor(samples: Sequence[Sample], row: str, figure: Figure = speed) -> float | None:
    return ratio(samples, row, [FLOOR], figure)


Column = Callable[[Sequence[Sample], str, Figure], "float | None"]
RIVALS: tuple[Column, ...] = (to_qemu, to_best, to_raw)
LIMITS: tuple[Column, ...] = (to_plain, to_floor)
