"""How the scans of ``triton_scan.py`` are cut into tiles: what a device has room for, and a model of the time."""

import functools
from collections.abc import Callable
from typing import NamedTuple

from ..reference import CELLS


class Limits(NamedTuple):
    """What a device has room for."""

    programs: int  # that are sure to run at the same time: one on each multiprocessor
    shared_bytes: int  # that a program may use
    cooperative: bool  # whether it can be told that they must
    most_alone: int  # hidden units that one program can have all of, for its registers
    most_rows: int  # of a program: Hopper multiplies 64 at a time


AMPERE = Limits(programs=108, shared_bytes=163 << 10, cooperative=True, most_alone=128, most_rows=32)  # A100, sm_80
HOPPER = Limits(
    programs=132, shared_bytes=227 << 10, cooperative=True, most_alone=128, most_rows=64
)  # H100 and H200, sm_90
BLACKWELL = Limits(programs=148, shared_bytes=227 << 10, cooperative=True, most_alone=128, most_rows=32)  # B200, sm_100
AMD = Limits(programs=304, shared_bytes=64 << 10, cooperative=True, most_alone=32, most_rows=32)  # MI300X, gfx942


class Tiles(NamedTuple):
    """The constants of a scan's kernel."""

    rows: int
    units: int
    splits: int
    chunk: int
    chunks: int
    resident: int
    in_flight: int
    alone: bool

    def blocks(self, hidden_size: int) -> int:
        return -(-hidden_size // self.units)


WARPS = 8
# What follows keeps every kernel within its registers (tests/test_triton_compile.py).
# Rows and units of a program that shares the hidden units with others.
SHARED_TILES = ((16, 16), (16, 32), (32, 16))
# The LSTM's backward step keeps the most values beside its product: with 32 rows there are not registers enough.
MOST_ROWS_OF_LSTM_BACKWARD = 16
# Rows of a program that has all units.
ALONE_ROWS = (16, 32, 64)
# Sums of a program that has all units: 64 registers of each thread.
ALONE_SUMS = 64 * 32 * WARPS
# Rows from which Hopper's tensor cores work by groups of four warps (wgmma), for half precision: the depth is not split
# then, a program has 16 units, and a product is not so deep that its many chunks would take long to compile.
LARGE_ROWS, LARGE_UNITS, LARGE_DEPTH = 64, 16, 1024
# Depth of a chunk at most: as much of each row is on its way to the product at a time.
MOST_CHUNK, ROWS_TIMES_CHUNK = 256, 16 * 256
# Bytes of a program's operands that are loaded ahead: 64 registers of each thread.
IN_FLIGHT_BYTES = 64 * 4 * 32 * WARPS
# Sums of a product, in all its splits: 32 registers of each thread.
SUMS = 32 * 32 * WARPS
# Registers of a thread that NVIDIA's compiler is given, in turn, until nothing spills. None is its own choice: often
# 128, so that two programs would fit on a multiprocessor, at the price of a few values in local memory.
REGISTERS = (None, 224, 240)

# The model, in nanoseconds of a step: its chain of latencies; an exchange between programs; a kilobyte of streamed
# weights in each program; a product of 16 rows x 8 columns x 16 of depth. Guesses: no GPU has confirmed them.
STEP_NS, EXCHANGE_NS, STREAMED_NS, PRODUCT_NS = 500.0, 900.0, 20.0, 0.4


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _alone(rows: int, units: int, depth: int, columns: int, itemsize: int, limits: Limits) -> Tiles | None:
    # its weights, and the operand of a product on its way there
    if depth * (columns + rows) * itemsize > limits.shared_bytes:
        return None
    # columns enough for all warps, or the depth is split among them
    splits = 1 if columns >= 8 * WARPS or rows >= LARGE_ROWS else min(WARPS, depth // 16)
    return Tiles(rows, units, splits, depth, 1, 1, 1, True)


def _shared(rows: int, units: int, depth: int, columns: int, itemsize: int, limits: Limits) -> Tiles:
    chunk = min(MOST_CHUNK, ROWS_TIMES_CHUNK // rows, max(16, _power_of_two(depth)))
    if itemsize == 8:  # products that take many registers: weights would find no room beside them
        return Tiles(rows, units, 1, 32, -(-depth // 32), 0, 1, False)
    while chunk > 16 and chunk * (rows + columns) * itemsize > limits.shared_bytes // 2:
        chunk //= 2
    chunks = -(-depth // chunk)
    weights, operand = chunk * columns * itemsize, chunk * rows * itemsize
    resident = max(0, limits.shared_bytes - operand) // weights
    if resident < chunks:  # one streamed chunk has to have room beside them
        resident = max(0, limits.shared_bytes - operand - weights) // weights
    splits = 1 if rows >= LARGE_ROWS else max(1, min(WARPS, chunk // 16, SUMS // (rows * columns)))
    return Tiles(rows, units, splits, chunk, chunks, min(chunks, resident), max(1, IN_FLIGHT_BYTES // operand), False)


def _step_ns(tiles: Tiles, columns: int, pairs: int, hidden_size: int, itemsize: int, limits: Limits) -> float:
    """About how long a step takes, all launches that the call needs counted together."""
    launches = -(-pairs * tiles.blocks(hidden_size) // limits.programs)
    streamed = (tiles.chunks - tiles.resident) * tiles.chunk * columns * itemsize / 1024
    products = tiles.rows / 16 * columns / 8 * tiles.chunks * tiles.chunk / 16 * (itemsize / 2) ** 2
    exchange = 0.0 if tiles.alone else EXCHANGE_NS
    return launches * (STEP_NS + exchange + streamed * STREAMED_NS + products * PRODUCT_NS)


@functools.lru_cache(maxsize=1024)
def choose_tiles(
    cell: str, backward: bool, hidden_size: int, groups: int, batch_tiles: int, itemsize: int, limits: Limits
) -> Tiles:
    """The tiles that the model finds fastest for ``groups`` groups of 16 x ``batch_tiles`` sequences each."""
    gates = CELLS[cell].gates
    width = 1 if gates == 1 else 4
    candidates = []

    def add(tiles, columns):
        if tiles is not None:
            pairs = groups * -(-batch_tiles * 16 // tiles.rows)
            candidates.append((_step_ns(tiles, columns, pairs, hidden_size, itemsize, limits), tiles))

    units = max(16, _power_of_two(hidden_size))
    if units <= limits.most_alone and itemsize < 8:
        for rows in ALONE_ROWS:
            large = rows >= LARGE_ROWS
            if rows > limits.most_rows or rows * units * width > ALONE_SUMS or (large and itemsize > 2):
                continue
            depth, columns = (units * width, units) if backward else (units, units * width)
            add(_alone(rows, units, depth, columns, itemsize, limits), columns)
    for rows, units in SHARED_TILES:
        if backward and cell == "lstm" and rows > MOST_ROWS_OF_LSTM_BACKWARD:
            continue
        depth, columns = (gates * hidden_size, units) if backward else (hidden_size, units * width)
        add(_shared(rows, units, depth, columns, itemsize, limits), columns)
    depth, columns = (gates * hidden_size, LARGE_UNITS) if backward else (hidden_size, LARGE_UNITS * width)
    if limits.most_rows >= LARGE_ROWS and itemsize == 2 and depth <= LARGE_DEPTH:
        add(_shared(LARGE_ROWS, LARGE_UNITS, depth, columns, itemsize, limits), columns)
    return min(candidates)[1]


def registers_without_spills(spills: Callable[[int | None], int]) -> int | None:
    """The first of REGISTERS with which ``spills`` says that nothing is spilled; if there is none, the least."""
    spilled = {}
    for registers in REGISTERS:
        spilled[registers] = spills(registers)
        if spilled[registers] == 0:
            return registers
    return min(spilled, key=spilled.get)
