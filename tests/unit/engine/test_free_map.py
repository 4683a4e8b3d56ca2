"""The map of free clusters."""

from __future__ import annotations

import random

from qedcore.engine.free_map import CLEAN, USED, FreeMap


def test_against_a_model(rng: random.Random) -> None:
    free, model = FreeMap(), dict[int, int]()
    space = 20_000  # several chunks
    for _ in range(3000):
        action = rng.random()
        start = rng.randrange(space)
        if action < 0.5:
            n = 0
            while n < rng.choice((1, 3, 9000)) and start + n not in model and start + n < space:
                n += 1
            state = rng.choice((CLEAN, USED))
            free.add(start, n, state)
            model.update((cluster, state) for cluster in range(start, start + n))
        elif action < 0.9:
            wanted = rng.choice((1, 2, 5000))
            found = free.take(wanted)
            if not model:
                assert found is None
                continue
            assert found is not None
            first, n, state = found
            assert first == min(model) and 0 < n <= wanted
            assert all(model.pop(cluster) == state for cluster in range(first, first + n))
            if n < wanted and first % 4096 + n < 4096:
                assert model.get(first + n) != state, "the run goes on"
        else:
            end = start
            assert free.end_of_used(end) == next((c + 1 for c in range(end - 1, -1, -1) if c not in model), 0)
            if action > 0.98:
                free.cut(end)
                model = {cluster: state for cluster, state in model.items() if cluster < end}
        assert free.n == len(model)
    free.clear()
    assert free.take(1) is None and free.n == 0


def test_memory_follows_what_is_free() -> None:
    free = FreeMap()
    for cluster in range(0, 1 << 40, 1 << 36):
        free.add(cluster, 1, CLEAN)
    assert len(free._chunks) == 16
    while free.take(1):
        pass
    assert not free._chunks
