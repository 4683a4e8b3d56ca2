"""Which clusters are used, and how."""

from __future__ import annotations

from qedcore.check.cluster_use import DATA, METADATA, SHARED, ClusterUse


def test_cluster_use() -> None:
    use = ClusterUse(1 << 51, 1000)
    assert (
        use.claim(3, DATA) and use.claim(999, METADATA) and use.claim(1000, DATA) and use.claim((1 << 51) - 1, DATA)
    )
    assert use.unmapped == 2
    assert not use.claim(3, METADATA) and not use.claim_free(999, DATA) and not use.claim_free(1000, DATA)
    assert use.marks(3) == bytes([DATA | METADATA | SHARED]) and use.marks(999, 2) == bytes([METADATA])
    assert use.claim_run(10, 5, DATA) and not use.claim_run(14, 2, DATA) and not use.claim_run(999, 2, DATA)
    assert use.marks(9, 7) == bytes([0, DATA, DATA, DATA, DATA, DATA, 0])
    assert [use.next_free(n) for n in (3, 10, 999, 5000)] == [4, 15, 1000, 5000]
    assert [use.next_used(n) for n in (0, 4, 1000)] == [3, 10, 1 << 51]
    assert (use.count(), use.last()) == (7, 1000)
