"""Pure arithmetic of the format: sizes, shifts and limits.  No I/O, no locks, immutable.

`pos` is a byte position in the guest device, `offset` a byte offset in the image file.

    pos:   | L1 index | L2 index | offset into cluster |
                      ^ l1_shift ^ l2_shift            0
"""

from __future__ import annotations

from ..errors import ImageFormatError, UnsupportedError
from ..units import KiB, MiB

SECTOR = 512  # bytes: the unit of atomic metadata writes and of image sizes
ENTRY = 8  # bytes per table entry

MIN_CLUSTER_SIZE = 4 * KiB  # bytes
MAX_CLUSTER_SIZE = 64 * MiB  # bytes
DEFAULT_CLUSTER_SIZE = 64 * KiB  # bytes
MIN_TABLE_SIZE = 1  # clusters
MAX_TABLE_SIZE = 16  # clusters
DEFAULT_TABLE_SIZE = 4  # clusters

# NBD, and the operating system, count bytes in a signed 64-bit number.
MAX_DEVICE_SIZE = 2**63 - SECTOR  # bytes

# L2 tables are cached in slices of at most this many bytes, so that a lookup that misses costs little.
MAX_SLICE_SIZE = 16 * KiB
# Whoever looks through whole tables reads at most this much at once: there are tables of 1 GiB.
MAX_PART_SIZE = 1 * MiB

UNALLOCATED = 0  # table entry: nothing here
ZERO_CLUSTER = 1  # L2 entry: reads as zeros

# The low 12 bits of an entry are reserved, and 0 in every offset.  An entry that pointed past the end of the file
# must never come true when the file grows: these low bits make it invalid for good, for QEMU too.  Eight of them are
# set, so that damage to a bit or a few of a valid entry cannot be taken for the mark, nor the mark for such damage.
RESERVED_BITS = 0xFFF
DANGLING = 0xBAD


def mark_dangling(entry: int) -> int:
    """The table entry `entry`, a multiple of the cluster size, made invalid for good."""
    return entry & ~RESERVED_BITS | DANGLING


def is_marked(entry: int) -> bool:
    """The table entry was made invalid for good: no cluster of the file is what it refers to."""
    return entry & RESERVED_BITS == DANGLING


def round_up(n: int, unit: int) -> int:
    return (n + unit - 1) // unit * unit


def _is_power_of_2(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def check_device_size(image_size: int) -> None:
    """Raise UnsupportedError for devices (bytes) that NBD and the operating system cannot address."""
    if image_size > MAX_DEVICE_SIZE:
        raise UnsupportedError(f"image size {image_size} is too large: NBD addresses at most {MAX_DEVICE_SIZE} bytes")


class Geometry:
    """What follows from cluster_size (bytes) and table_size (clusters).

    Raises ImageFormatError for values that the format does not allow (specification, "Header").
    """

    def __init__(self, cluster_size: int, table_size: int) -> None:
        if not (MIN_CLUSTER_SIZE <= cluster_size <= MAX_CLUSTER_SIZE and _is_power_of_2(cluster_size)):
            raise ImageFormatError(
                f"QED cluster size is invalid: {cluster_size} bytes, "
                f"not a power of 2 from {MIN_CLUSTER_SIZE} to {MAX_CLUSTER_SIZE}"
            )
        if not (MIN_TABLE_SIZE <= table_size <= MAX_TABLE_SIZE and _is_power_of_2(table_size)):
            raise ImageFormatError(
                f"QED table size is invalid: {table_size} clusters, "
                f"not a power of 2 from {MIN_TABLE_SIZE} to {MAX_TABLE_SIZE}"
            )
        self.cluster_size = cluster_size  # bytes
        self.cluster_mask = cluster_size - 1
        self.table_size = table_size  # clusters
        self.table_bytes = table_size * cluster_size
        self.table_entries = self.table_bytes // ENTRY
        self.l2_shift = cluster_size.bit_length() - 1
        self.l1_shift = self.l2_shift + self.table_entries.bit_length() - 1
        self.l2_table_reach = 1 << self.l1_shift  # guest bytes mapped by one L2 table
        self.max_image_size = self.table_entries * self.l2_table_reach  # bytes
        self.slice_entries = min(self.table_bytes, MAX_SLICE_SIZE) // ENTRY
        self.slice_bytes = self.slice_entries * ENTRY
        self.slice_mask = self.slice_entries - 1
        self.slice_shift = self.l2_shift + self.slice_entries.bit_length() - 1
        self.slices_per_table = self.table_entries // self.slice_entries
        self.part_entries = min(self.table_bytes, MAX_PART_SIZE) // ENTRY
        self.part_bytes = self.part_entries * ENTRY

    def clusters(self, length: int) -> int:
        """Clusters that `length` bytes need, counted from a cluster's start."""
        return (length + self.cluster_mask) >> self.l2_shift

    def start_of_cluster(self, n: int) -> int:
        return n & ~self.cluster_mask

    def slice_offset(self, pos: int) -> int:
        """Bytes from the start of pos's L2 table to the slice that maps pos."""
        return (pos >> self.slice_shift) % self.slices_per_table * self.slice_bytes

    def l1_entries(self, image_size: int) -> int:
        """L1 entries that a device of image_size bytes can reach, rounded up to whole sectors."""
        reached = -(-image_size >> self.l1_shift) if image_size else 0
        per_sector = SECTOR // ENTRY
        return min(self.table_entries, round_up(max(reached, 1), per_sector))

    def check_image_size(self, image_size: int) -> None:
        """Raise ImageFormatError unless the tables can map a device of image_size bytes."""
        if image_size % SECTOR or image_size > self.max_image_size:
            raise ImageFormatError(
                f"QED image size is invalid: {image_size} bytes, "
                f"not a multiple of {SECTOR} up to {self.max_image_size}"
            )


class Bounds:
    """Which offsets of a file of this geometry can be clusters and tables.

    `end` is the first byte after the last whole cluster: it grows with the file.
    """

    def __init__(self, geometry: Geometry, header_clusters: int, file_size: int) -> None:
        self.geometry = geometry
        self.start = header_clusters * geometry.cluster_size  # bytes: end of the header area
        # QEMU counts a last cluster whose final sector is cut short, and ignores one that lacks a sector.
        self.end = geometry.start_of_cluster(round_up(file_size, SECTOR))  # bytes

    def valid_cluster(self, offset: int) -> bool:
        return self.start <= offset < self.end and not offset & self.geometry.cluster_mask

    def valid_table(self, offset: int) -> bool:
        last = offset + self.geometry.table_bytes - self.geometry.cluster_size
        return self.valid_cluster(offset) and last < self.end
