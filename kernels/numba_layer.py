"""A whole layer in one call of a kernel, forward or backward: the Numba backend.

The threads of a team first pack the weights together, then take parts (``numba_scan.py``), and in the backward pass
share out the products over all time steps (``numba_gradients.py``). This file is also the Python side: it plans a
call, allocates what it writes, and makes the arrays contiguous.
"""

import collections
import ctypes
import functools
import itertools
import math
import threading
from typing import NamedTuple

import torch
from numba import types
from torch import Tensor

from ..ops import zero_before_first_step
from ..options import STEP_OPTIONS
from . import numba_call as field
from . import numba_gradients
from .numba_cells import BACKWARD, FORWARD
from .numba_compile import copy_of, kernel_address, new_call, run, use_large_pages
from .numba_pairs import HAS_PAIRS, PAIR_ROWS
from .numba_scan import LAYOUTS, make_backward_part, make_forward_part, panels_of
from .numba_simd import VECTOR_BYTES, advance, as_pointer, checksum, jit, lanes, load, named_jit, store
from .numba_team import BARRIER, PACKING, PARTS_TAKEN, TICKET, leave, take, team_size, wait_for
from .numba_tile import DEPTH_BLOCK, WIDE, neighbour_vectors, operands_of

# Up to so many rows (time steps x sequences) the weights are used as they lie: packing them costs more than it gains.
FEW_ROWS = 16
# Multiply-adds that make another thread worth its start (a few microseconds).
WORK_PER_THREAD = 100_000
# Sequences that go through a step side by side, at most: the more, the fewer times its weights are read.
BLOCK_ROWS = PAIR_ROWS
# Bytes of these rows' gates of a block of units, of a block of their depth in the backward product, and of the gates in
# a block of time steps: shares of the L2 cache. But a block of time steps has so many rows at least: for fewer, reading
# the projection's weights takes longer than the products.
BLOCK_BYTES, PROJECTION_BYTES, PROJECTION_ROWS = 192 << 10, 256 << 10, 96
# Recurrent weights of more bytes are asked for before they are needed. It costs a little where they are near anyway.
AHEAD_BYTES = 8 << 20


@jit
def _combine_biases(call, direction, gate_count, zero):
    """BIAS and BIAS_HN of one direction. The GRU's hidden-side bias of n stays apart: r acts on it."""
    size = call[field.HIDDEN_SIZE]
    gate_size = gate_count * size
    target = advance(as_pointer(call[field.BIAS], zero), direction * gate_size)
    bias_ih = advance(as_pointer(call[field.BIAS_IH], zero), direction * gate_size)
    bias_hh = advance(as_pointer(call[field.BIAS_HH], zero), direction * gate_size)
    there, apart = call[field.BIAS_IH] != 0, call[field.BIAS_HN] != 0
    both = gate_size - size if apart else gate_size
    vector = lanes(target)
    for n in range(0, both, vector):
        total = load(bias_ih, n, both - n if there else 0) + load(bias_hh, n, both - n if there else 0)
        store(target, n, both - n, total)
    if apart:
        bias_hn = advance(as_pointer(call[field.BIAS_HN], zero), direction * size)
        for n in range(0, size, vector):
            count = size - n
            store(target, both + n, count, load(bias_ih, both + n, count if there else 0))
            store(bias_hn, n, count, load(bias_hh, both + n, count if there else 0))


def _make_forward_packing(layout, operands, jit):
    gate_count, vectors, panel_vectors = layout.gates, layout.vectors, layout.panel_vectors
    stored, packed, depth_of, pack_rows = operands.stored, operands.packed, operands.depth, operands.pack_rows

    @jit
    def gate_panel(weight, depth, size, panel, panels):
        """Panel number ``panel`` of a weight (G*H, depth)."""
        vector = lanes(panels)
        unit = panel * panel_vectors * vector
        source = advance(weight, unit * depth)
        target = advance(panels, panel * depth_of(depth) * vectors * vector)
        if gate_count > 1:
            pack_rows(source, depth, vectors, size, size - unit, 0, target)
        else:
            pack_rows(source, depth, neighbour_vectors(size - unit, vector), vector, size - unit, vector, target)

    @jit
    def is_kept(call, item, weight, block_stride, blocks, count):
        """Whether an item's panel holds these weights: ``blocks`` times ``count`` values.

        The weights themselves are asked, not their version: a write through ``.data``, a numpy view or another
        process's shared memory counts none up. They are read once for it, in order.
        """
        if call[field.CHECKSUMS] == 0:
            return False
        now = types.int64(1)
        for block in range(blocks):
            now = checksum(advance(weight, block * block_stride), count, now)
        sums = as_pointer(call[field.CHECKSUMS], types.int64(0))
        kept = sums[item] == now
        sums[item] = now
        return kept

    @jit
    def packing(call, zero):
        """Pack every direction's weights and add up its biases, shared out among the threads."""
        size, state_size, input_size = call[field.HIDDEN_SIZE], call[field.STATE_SIZE], call[field.INPUT_SIZE]
        gate_size, directions = gate_count * size, call[field.DIRECTIONS]
        weight_ih, panels_ih = as_pointer(call[field.WEIGHT_IH], stored), as_pointer(call[field.PANELS_IH], packed)
        weight_hh, panels_hh = as_pointer(call[field.WEIGHT_HH], stored), as_pointer(call[field.PANELS_HH], packed)
        weight_hr, panels_hr = as_pointer(call[field.WEIGHT_HR], stored), as_pointer(call[field.PANELS_HR], packed)
        vector = lanes(panels_hh)
        wide = WIDE * vector
        gate_panels = projection_panels = types.int64(0)
        if call[field.PACKED] != 0:
            gate_panels = panels_of(size, panel_vectors * vector)
            if call[field.WEIGHT_HR] != 0:
                projection_panels = panels_of(state_size, wide)
        width = gate_panels * vectors * vector
        per_direction = 2 * gate_panels + projection_panels + 1
        while True:
            item = take(call, PACKING)
            if item >= directions * per_direction:
                break
            number = item
            direction, item = item // per_direction, item % per_direction
            if item < 2 * gate_panels:
                panel, of_input = item % gate_panels, item < gate_panels
                depth = input_size if of_input else state_size
                weight = advance(weight_ih if of_input else weight_hh, direction * gate_size * depth)
                panels = advance(panels_ih if of_input else panels_hh, direction * width * depth_of(depth))
                unit = panel * panel_vectors * vector
                count = min(panel_vectors * vector, size - unit) * depth
                if not is_kept(call, number, advance(weight, unit * depth), size * depth, gate_count, count):
                    gate_panel(weight, depth, size, panel, panels)
            elif item < 2 * gate_panels + projection_panels:
                panel = item - 2 * gate_panels
                left = state_size - panel * wide
                weight = advance(weight_hr, (direction * state_size + panel * wide) * size)
                if not is_kept(call, number, weight, 0, 1, min(left, wide) * size):
                    pack_rows(
                        *(weight, size, neighbour_vectors(left, vector), vector, left, vector),
                        advance(panels_hr, (direction * projection_panels + panel) * wide * depth_of(size)),
                    )
            else:
                _combine_biases(call, direction, gate_count, zero)

    return packing


def make_backward_packing(layout, operands, jit):
    gate_count = layout.gates
    stored, packed, depth_of, pack_lines = operands.stored, operands.packed, operands.depth, operands.pack_lines

    @jit
    def line_panels(weight, depth, columns, panels, item):
        """One panel of neighbouring columns of D weights (depth, columns); items count panels, then directions."""
        vector = lanes(panels)
        wide = WIDE * vector
        panel, direction = item % panels_of(columns, wide), item // panels_of(columns, wide)
        left = columns - panel * wide
        vectors = neighbour_vectors(left, vector)
        pack_lines(
            *(advance(weight, direction * depth * columns + panel * wide), columns, depth, vectors, left),
            *(advance(panels, item * depth_of(depth) * wide), vectors * vector, vector),
        )

    @jit
    def packing(call, zero):
        """Pack the weights of the products with the gates' gradients, shared out among the threads."""
        size, state_size, input_size = call[field.HIDDEN_SIZE], call[field.STATE_SIZE], call[field.INPUT_SIZE]
        gate_size, directions = gate_count * size, call[field.DIRECTIONS]
        wide = WIDE * lanes(as_pointer(call[field.PANELS_HH], packed))
        if call[field.PACKED] == 0:
            return
        items_hh = directions * panels_of(state_size, wide)
        items_ih = directions * panels_of(input_size, wide) if call[field.DX] != 0 else types.int64(0)
        items_hr = directions * panels_of(size, wide) if call[field.WEIGHT_HR] != 0 else types.int64(0)
        while True:
            item = take(call, PACKING)
            if item < items_hh:
                weight, panels = as_pointer(call[field.WEIGHT_HH], stored), as_pointer(call[field.PANELS_HH], packed)
                line_panels(weight, gate_size, state_size, panels, item)
                continue
            item -= items_hh
            if item < items_ih:
                weight, panels = as_pointer(call[field.WEIGHT_IH], stored), as_pointer(call[field.PANELS_IH], packed)
                line_panels(weight, gate_size, input_size, panels, item)
                continue
            item -= items_ih
            if item >= items_hr:
                break
            weight, panels = as_pointer(call[field.WEIGHT_HR], stored), as_pointer(call[field.PANELS_HR], packed)
            line_panels(weight, state_size, size, panels, item)

    return packing


@jit
def _no_products(call, thread, team, zero):
    pass


def _build(name: str, cell: str, backward: bool, dtype: torch.dtype, projected: bool):
    """The function to compile for one cell, pass and dtype: what every thread of a team runs.

    For bfloat16 x and the weights are that, and products take pairs of it; the other arrays are float32.
    """
    zero = types.float64(0) if dtype == torch.float64 else types.float32(0)
    layout, operands, jit = LAYOUTS[cell], operands_of(dtype), named_jit(name)
    if backward:
        packing = make_backward_packing(layout, operands, jit)
        run_part = make_backward_part(layout, BACKWARD[cell], operands, jit)
        products = numba_gradients.make_products(layout, operands, numba_gradients.plain_factors(layout), jit)
    else:
        packing = _make_forward_packing(layout, operands, jit)
        run_part = make_forward_part(layout, FORWARD[cell], projected, operands, jit)
        products = _no_products

    # One function, for every one that calls another optimises all of its code again.
    def whole_layer(call):
        thread, team = take(call, TICKET), team_size(call)
        packing(call, zero)
        if team > 1:
            wait_for(call, BARRIER, team)
        count, members = call[field.PARTS], call[field.MEMBERS]
        shared = members > 1 and count * members <= team
        part = thread // members if shared else take(call, PARTS_TAKEN)
        while part < count:
            if shared:
                run_part(call, part, thread % members, members, zero)
                break
            run_part(call, part, types.int64(0), types.int64(1), zero)
            part = take(call, PARTS_TAKEN)
        if backward and team > 1:
            wait_for(call, BARRIER, 2 * team)
        products(call, thread, team, zero)
        leave(call, team)

    return whole_layer


@functools.cache
def kernel(cell: str, backward: bool, dtype: torch.dtype, projected: bool) -> int:
    """The address of a cell's kernel for one pass: float32, float64, or float32 with products of bfloat16.

    A forward pass with a projection has a kernel of its own: compiling it takes longer. The backward pass has not.
    """
    projected = projected and not backward
    name = f"{cell}{'_projected' * projected}_{'backward' if backward else 'forward'}_{str(dtype)[6:]}"
    return kernel_address(name, functools.partial(_build, name, cell, backward, dtype, projected))


# What the plan assumes of a core: multiply-adds per nanosecond, of 4 bytes (half as many of 8 bytes, twice as many of
# 2); bytes of weights that it reads per nanosecond, by the bytes up to which that holds (from the L2 cache, from a
# shared one, from one that is mostly full); nanoseconds of a hidden unit's activation functions, and of a wait for
# other threads.
MULTIPLY_ADDS = 50.0
READING = ((512 << 10, 100.0), (8 << 20, 60.0), (math.inf, 40.0))
UNIT_NS, WAIT_NS = 1.0, 500.0


def _step_ns(sequences: int, weights: int, units: int, itemsize: int, members: int, panels: int) -> float:
    """About how long one time step of a part takes each of its ``members`` threads."""
    share = -(-panels // members) / panels
    size = weights * itemsize * share
    computing = weights * share * sequences / (MULTIPLY_ADDS * 4 / itemsize)
    reading = size / next(rate for most, rate in READING if size <= most)
    return max(computing, reading) + sequences * units * share * UNIT_NS + (WAIT_NS if members > 1 else 0)


def split_batch(threads, batch, reverse, weights, units, panels, itemsize, shareable) -> tuple[int, int]:
    """Into how many ranges the batch is cut, and how many threads share a part, for the shortest time step."""
    directions = len(reverse)
    best = None
    for chunks in range(1, min(batch, -(-threads // directions)) + 1):
        members = max(1, min(threads // (directions * chunks), panels)) if shareable else 1
        turns = -(-directions * chunks // threads)
        time = turns * _step_ns(-(-batch // chunks), weights, units, itemsize, members, panels)
        if best is None or time <= best[0]:
            best = time, chunks, members
    _, chunks, members = best
    return chunks, members


def make_parts(batch: int, chunks: int, reverse, batch_sizes: Tensor | None) -> list[tuple[int, int, int, int]]:
    """The rows of the part table: every direction, with ``chunks`` ranges of the batch of about as many rows each."""
    bounds = [batch * chunk // chunks for chunk in range(chunks + 1)]
    if batch_sizes is not None and chunks > 1:
        # sequences are sorted by falling length: row b runs in all steps but those whose batch size is at most b
        ended = torch.bincount(batch_sizes, minlength=batch + 1)[:batch].cumsum(0)
        running = (len(batch_sizes) - ended).cumsum(0)
        shares = running[-1] * torch.arange(1, chunks) / chunks
        bounds = [0, *(torch.searchsorted(running, shares) + 1).tolist(), batch]
    return [
        (direction, backwards, first, end)
        for first, end in itertools.pairwise(bounds)
        for direction, backwards in enumerate(reverse)
        if end > first
    ]


class Plan(NamedTuple):
    """How a call of given sizes is run."""

    call: ctypes.Array  # but for the addresses
    regions: tuple[tuple[int, int], ...]  # of scratch: the field that takes the address, and the offset in bytes
    scratch_bytes: int
    threads: int
    members: int
    # of packed weights that may be kept for the next call, with their checksums
    kept: tuple[tuple[int, int], ...] = ()
    kept_bytes: int = 0


class Sizes(NamedTuple):
    """What a plan depends on."""

    cell: str
    backward: bool
    dtype: torch.dtype  # of the kernel
    threads: int  # at most
    rows: int
    steps: int
    batch: int
    directions: int
    sources: int
    input_size: int
    hidden_size: int
    state_size: int
    reverse: tuple[int, ...]
    projected: bool
    needed: bool  # forward: the reserve, backward: dx
    examples: int

    @property
    def itemsize(self) -> int:
        """Bytes of a value of the arrays, which are float32 where products take bfloat16."""
        return 8 if self.dtype == torch.float64 else 4

    @property
    def paired(self) -> bool:
        """Whether products take their operands as pairs of bfloat16."""
        return self.dtype == torch.bfloat16


@functools.lru_cache(maxsize=1024)
def make_plan(sizes: Sizes, batch_sizes: Tensor | None = None) -> Plan:
    """The plan for a call; ``batch_sizes`` are given only if they differ from one another (then it is not cached)."""
    layout, itemsize, backward = LAYOUTS[sizes.cell], sizes.itemsize, sizes.backward
    directions, size, state_size = sizes.directions, sizes.hidden_size, sizes.state_size
    input_size, batch = sizes.input_size, sizes.batch
    gate_size, lanes = layout.gates * size, VECTOR_BYTES // itemsize
    work = (2 if backward else 1) * sizes.rows * directions * gate_size * (state_size + input_size)
    threads = max(1, min(sizes.threads, work // WORK_PER_THREAD))
    shareable = batch_sizes is None and not sizes.projected
    panels, operand_bytes = max(1, size // (WIDE * lanes)), 2 if sizes.paired else itemsize
    weights = gate_size * state_size
    chunks, members = split_batch(threads, batch, sizes.reverse, weights, size, panels, operand_bytes, shareable)
    parts = make_parts(batch, chunks, sizes.reverse, batch_sizes)
    if not backward:  # threads without a part of their own are of use in the products of the backward pass only
        threads = min(threads, len(parts) * members)
    part_rows = max(end - first for _, _, first, end in parts)
    blocks = -(-part_rows // BLOCK_ROWS)
    block_rows = min(-(-part_rows // (6 * blocks)) * 6, part_rows)
    panel_units = layout.panel_vectors * lanes
    block_units = max(1, BLOCK_BYTES // (block_rows * layout.gates * panel_units * itemsize)) * panel_units
    block_units = min(block_units, -(-size // panel_units) * panel_units)
    block_depth = max(1, BLOCK_BYTES // (block_rows * itemsize * DEPTH_BLOCK)) * DEPTH_BLOCK
    projected_rows = max(PROJECTION_ROWS, PROJECTION_BYTES // (gate_size * itemsize))
    block_steps = max(1, min(sizes.steps, projected_rows // part_rows))
    packed = sizes.rows > FEW_ROWS

    table = field.PART_BARRIERS + (8 * len(parts) if members > 1 else 0)
    values = [0] * table
    values.extend(itertools.chain.from_iterable(parts))
    values[field.PARTS], values[field.MEMBERS], values[field.PART_TABLE] = len(parts), members, table
    values[field.BLOCK_ROWS], values[field.BLOCK_UNITS] = block_rows, block_units
    values[field.BLOCK_STEPS], values[field.BLOCK_DEPTH] = block_steps, block_depth
    values[field.AHEAD], values[field.PACKED] = weights * operand_bytes > AHEAD_BYTES, packed
    values[field.STEPS], values[field.ROWS], values[field.BATCH] = sizes.steps, sizes.rows, batch
    values[field.DIRECTIONS], values[field.SOURCES] = directions, sizes.sources
    values[field.INPUT_SIZE], values[field.HIDDEN_SIZE], values[field.STATE_SIZE] = input_size, size, state_size
    values[field.EXAMPLES] = sizes.examples

    wide = WIDE * lanes

    def up(columns: int) -> int:
        return -(-columns // wide) * wide

    def deep(depth: int) -> int:
        """Lines of a panel for a product of this depth."""
        return -(-depth // 2) if sizes.paired else depth

    deepest = max(gate_size, state_size) if backward else max(input_size, size, state_size)
    pairs = PAIR_ROWS * -(-deep(deepest) // lanes) * lanes if sizes.paired else 0
    if backward:
        scratch = max(
            numba_gradients.scratch_size(lanes),
            block_rows * size if sizes.projected else 0,
        )
        regions = {}
        panels = {
            field.PANELS_HH: deep(gate_size) * up(state_size),
            field.PANELS_IH: deep(gate_size) * up(input_size) if sizes.needed else 0,
            field.PANELS_HR: deep(state_size) * up(size) if sizes.projected else 0,
        }
    else:
        scratch = block_rows * (layout.gates * block_units + size) + (
            0 if sizes.needed else block_steps * part_rows * gate_size
        )
        regions = {field.BIAS: directions * gate_size, field.BIAS_HN: directions * size if sizes.cell == "gru" else 0}
        line = -(-size // (layout.panel_vectors * lanes)) * layout.vectors * lanes
        panels = {
            field.PANELS_IH: line * deep(input_size),
            field.PANELS_HH: line * deep(state_size),
            field.PANELS_HR: up(state_size) * deep(size) if sizes.projected else 0,
        }
    scratch = -(-scratch // lanes) * lanes + pairs
    values[field.SCRATCH_SIZE], values[field.PAIRS_SIZE] = scratch, pairs
    regions[field.SCRATCH] = scratch * max(len(parts) * members, threads)
    panels = {place: directions * count for place, count in panels.items()} if packed else {}
    kept = ((), 0)
    if packed and not backward and not sizes.needed:
        projection_panels = -(-state_size // wide) if sizes.projected else 0
        items = directions * (2 * -(-size // (layout.panel_vectors * lanes)) + projection_panels + 1)
        kept = places({field.CHECKSUMS: items * 8 // itemsize} | panels, itemsize)
        if kept[1] <= KEPT_BYTES:
            panels = {}
        else:
            kept = ((), 0)
    return Plan(new_call(values), *places(regions | panels, itemsize), threads, members, *kept)


def places(counts: dict[int, int], itemsize: int) -> tuple[tuple[tuple[int, int], ...], int]:
    """Where arrays of so many values stand in memory, by the fields that take their addresses, and its bytes."""
    offset, offsets = 0, []
    for place, count in counts.items():
        if count:
            offsets.append((place, offset))
            offset += -(-count * itemsize // 64) * 64
    return tuple(offsets), offset


class _Kept(threading.local):
    """Memory of this thread's last calls, for the next ones: fresh memory costs more than packing weights into it."""

    scratch: Tensor | None = None

    def __init__(self):
        # packed weights of inference by what tells them apart, those used last at the end
        self.panels: collections.OrderedDict[tuple, Tensor] = collections.OrderedDict()


_kept = _Kept()
# More scratch than this goes back to the system after every call, more packed weights are not kept, nor those of more
# layers: weights that are trained between calls leave one entry after the other behind.
KEPT_BYTES, KEPT_LAYERS = 64 << 20, 32


def new_panels(plan: Plan) -> Tensor:
    """Memory for packed weights, in which none are yet."""
    memory = torch.empty(plan.kept_bytes, dtype=torch.uint8, device="cpu")
    use_large_pages(memory)
    return _without_panels(plan, memory)


def _without_panels(plan: Plan, memory: Tensor) -> Tensor:
    memory[: plan.kept[1][1]].zero_()  # the checksums stand first
    return memory


def _take_panels(plan: Plan, key: tuple) -> Tensor:
    """What was kept under ``key``, or memory that is nobody's. Whether it is still right is for the kernel to see."""
    kept = _kept.panels
    memory = kept.pop(key, None)
    if memory is not None:
        return memory
    while kept and (
        len(kept) >= KEPT_LAYERS or sum(panels.numel() for panels in kept.values()) + plan.kept_bytes > KEPT_BYTES
    ):
        _, memory = kept.popitem(last=False)
        if memory.numel() == plan.kept_bytes:
            return _without_panels(plan, memory)
    return new_panels(plan)


def prepared(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The tensor as kernels take it: itself where it is that already."""
    if tensor is None or (tensor.dtype is dtype and tensor.is_contiguous() and not tensor.is_neg()):
        return tensor
    return tensor.to(dtype).contiguous().resolve_neg()


def new_tensor(like: Tensor, *shape: int) -> Tensor:
    """Memory for a result, of the dtype of ``like``."""
    tensor = like.new_empty(shape)
    use_large_pages(tensor)
    return tensor


def copied(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype is dtype and not tensor.is_neg():
        return tensor.clone(memory_format=torch.contiguous_format)  # what follows does it too, but takes longer
    return tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _converted(results: tuple[Tensor | None, ...], dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    if all(result is None or result.dtype is dtype for result in results):
        return results
    return tuple(None if result is None else result.to(dtype) for result in results)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _kernel_dtype(dtype: torch.dtype, rows: int) -> torch.dtype:
    """The dtype of the kernel for tensors of ``dtype``: bfloat16 where the processor multiplies it and it is packed."""
    return dtype if dtype == torch.bfloat16 and HAS_PAIRS and rows > FEW_ROWS else _compute_dtype(dtype)


def can_run(call) -> str | None:
    """Why this backend cannot run ``call``, or None if it can."""
    if call.device != "cpu":
        return f"it runs on the CPU, the input is on {call.device}"
    if call.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"it computes in floating point, the input is {call.dtype}"
    if call.options and call.proj_size and (missing := STEP_OPTIONS.intersection(call.options)):
        return f"its kernels have no {', '.join(sorted(missing))} with projections (proj_size)"
    return None


def run_plan(
    plan: Plan, address_of_kernel: int, arrays: dict[int, Tensor | None], numbers: dict[int, int] | None = None
) -> None:
    """Run a kernel by its plan on arrays, given by the field that takes their address, and on more numbers."""
    call = copy_of(plan.call)
    for place, number in (numbers or {}).items():
        call[place] = number
    for place, tensor in arrays.items():
        if tensor is not None:
            call[place] = tensor.data_ptr()
    if plan.kept:
        # a few values, not the address: weights of two directions are put together anew for every call
        weight = arrays[field.WEIGHT_HH]
        first = ctypes.string_at(weight.data_ptr(), min(VECTOR_BYTES, weight.nbytes))
        key = address_of_kernel, plan.kept, first
        panels = _take_panels(plan, key)
        for place, offset in plan.kept:
            call[place] = panels.data_ptr() + offset
    # taken, not looked at: what the interpreter runs in between must not use the same memory
    memory, _kept.scratch = _kept.scratch, None
    if memory is None or memory.numel() < plan.scratch_bytes:
        memory = torch.empty(plan.scratch_bytes, dtype=torch.uint8, device="cpu")
        use_large_pages(memory)
    address = memory.data_ptr()
    for place, offset in plan.regions:
        call[place] = address + offset
    run(address_of_kernel, call, plan.threads)
    if memory.numel() <= KEPT_BYTES:
        _kept.scratch = memory
    if plan.kept:
        _kept.panels[key] = panels


def _plan(sizes: Sizes, batch_sizes: Tensor | None) -> Plan:
    return make_plan(sizes) if batch_sizes is None else make_plan.__wrapped__(sizes, batch_sizes)


def count_steps(rows: int, batch: int, batch_sizes: Tensor | None) -> tuple[int, Tensor | None]:
    """The number of time steps, and the batch sizes if they differ from one another."""
    if batch_sizes is None or int(batch_sizes[-1]) == batch:
        return rows // batch, None
    return len(batch_sizes), batch_sizes.contiguous()


def layer_forward(
    cell: str,
    x: Tensor,
    weight_ih: Tensor,
    bias_ih: Tensor | None,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: list[int],
    save: bool,
    resets: Tensor | None = None,
    cells: bool = False,
) -> tuple[Tensor | None, ...]:
    """Run a layer; see ``fastrnn.ops`` for shapes. Absent results are None; without ``cells`` there are six."""
    dtype, rows = x.dtype, x.shape[0]
    compute, kernel_dtype = _compute_dtype(dtype), _kernel_dtype(dtype, rows)

    x, weight_ih, weight_hh, weight_hr = (
        prepared(tensor, kernel_dtype) for tensor in (x, weight_ih, weight_hh, weight_hr)
    )
    bias_ih, bias_hh = prepared(bias_ih, compute), prepared(bias_hh, compute)
    batch, state_size = h0.shape[1:]
    hidden = copied(h0, compute)
    cell_state = None if c0 is None else copied(c0, compute)
    directions, size = weight_hh.shape[0], weight_hh.shape[1] // LAYOUTS[cell].gates
    output = new_tensor(hidden, rows, directions * state_size)
    gates = hidden_prev = cell_prev = None
    if save:
        gates = new_tensor(hidden, rows, directions, LAYOUTS[cell].saved * size)
        hidden_prev = new_tensor(hidden, rows, directions, state_size)
        cell_prev = None if c0 is None else new_tensor(hidden, rows, directions, size)
    cells = new_tensor(hidden, rows, directions * size) if cells else None
    if rows:
        if resets is not None:
            resets = resets.contiguous()
            zero_before_first_step(resets, reverse, (hidden, cell_state), batch_sizes)
        _, sources, input_size = x.shape
        steps, batch_sizes = count_steps(rows, batch, batch_sizes)
        sizes = Sizes(
            *(cell, False, kernel_dtype, torch.get_num_threads(), rows, steps, batch, directions, sources),
            *(input_size, size, state_size, tuple(reverse), weight_hr is not None, save, 1),
        )
        plan = _plan(sizes, batch_sizes)
        arrays = {
            **{field.X: x, field.WEIGHT_IH: weight_ih, field.WEIGHT_HH: weight_hh, field.WEIGHT_HR: weight_hr},
            **{field.BIAS_IH: bias_ih, field.BIAS_HH: bias_hh, field.BATCH_SIZES: batch_sizes},
            field.RESETS: resets,
            **{field.HIDDEN: hidden, field.CELL: cell_state, field.OUTPUT: output},
            **{field.GATES: gates, field.HIDDEN_PREV: hidden_prev, field.CELL_PREV: cell_prev},
            field.HIDDEN_2: hidden.clone() if plan.members > 1 else None,
        }
        if cells is not None:
            arrays[field.CELLS] = cells
        run_plan(plan, kernel(cell, False, kernel_dtype, weight_hr is not None), arrays)
    results = (output, hidden, cell_state, gates, hidden_prev, cell_prev)
    if cells is not None:
        results += (cells,)
    return _converted(results, dtype)


def layer_backward(
    cell: str,
    d_output: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    gates: Tensor,
    hidden_prev: Tensor,
    cell_prev: Tensor | None,
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    batch: int,
    batch_sizes: Tensor | None,
    reverse: list[int],
    examples: int,
    needs: list[bool],
    resets: Tensor | None,
    d_cells: Tensor | None,
    overwrite: bool,
) -> tuple[Tensor | None, ...]:
    """Back-propagate through a layer; see ``fastrnn.ops`` for shapes. Absent results are None."""
    dtype = x.dtype
    rows, sources, input_size = x.shape
    compute, kernel_dtype = _compute_dtype(dtype), _kernel_dtype(dtype, rows)

    saved = gates
    x, weight_ih, weight_hh, weight_hr = (
        prepared(tensor, kernel_dtype) for tensor in (x, weight_ih, weight_hh, weight_hr)
    )
    gates, hidden_prev, cell_prev, d_output = (
        prepared(tensor, compute) for tensor in (gates, hidden_prev, cell_prev, d_output)
    )
    directions, gate_size, state_size = weight_hh.shape
    size = gate_size // LAYOUTS[cell].gates

    def state_gradient(tensor, columns):
        if tensor is None:
            return gates.new_zeros(directions, batch, columns)
        return copied(tensor, compute)

    needs_x, needs_weight_ih, needs_bias_ih, needs_weight_hh, needs_bias_hh, needs_weight_hr = needs
    new = gates.new_empty if rows else gates.new_zeros
    d_hidden = state_gradient(d_h_n, state_size)
    d_cell = None if cell_prev is None else state_gradient(d_c_n, size)
    dx = new_tensor(gates, rows, sources, input_size) if needs_x else None
    d_weight_ih = new(examples, directions, gate_size, input_size) if needs_weight_ih else None
    d_bias_ih = new(examples, directions, gate_size) if needs_bias_ih else None
    d_weight_hh = new(examples, directions, gate_size, state_size) if needs_weight_hh else None
    d_bias_hh = new(examples, directions, gate_size) if needs_bias_hh else None
    d_weight_hr = new(examples, directions, state_size, size) if needs_weight_hr else None
    if rows:
        unprojected = None
        if needs_weight_hr:
            i, f, g, o = gates.chunk(4, -1)
            unprojected = o * torch.tanh(f * cell_prev + i * g)
        # a reserve that was converted is a copy already
        dgates = gates if overwrite or gates is not saved else new_tensor(gates, *gates.shape)
        d_projected = None if weight_hr is None else gates.new_empty(rows, directions, state_size)
        steps, batch_sizes = count_steps(rows, batch, batch_sizes)
        sizes = Sizes(
            *(cell, True, kernel_dtype, torch.get_num_threads(), rows, steps, batch, directions, sources),
            *(input_size, size, state_size, tuple(reverse), weight_hr is not None, needs_x, examples),
        )
        arrays = {
            **{field.X: x, field.WEIGHT_IH: weight_ih, field.WEIGHT_HH: weight_hh, field.WEIGHT_HR: weight_hr},
            **{field.GATES: gates, field.HIDDEN_PREV: hidden_prev, field.CELL_PREV: cell_prev},
            **{field.D_OUTPUT: d_output, field.D_HIDDEN: d_hidden, field.D_CELL: d_cell},
            **{field.DGATES: dgates, field.D_PROJECTED: d_projected, field.UNPROJECTED: unprojected},
            **{field.DX: dx, field.D_WEIGHT_IH: d_weight_ih, field.D_WEIGHT_HH: d_weight_hh},
            **{field.D_WEIGHT_HR: d_weight_hr, field.D_BIAS_IH: d_bias_ih, field.D_BIAS_HH: d_bias_hh},
            **{field.BATCH_SIZES: batch_sizes, field.RESETS: None if resets is None else resets.contiguous()},
        }
        if d_cells is not None:
            arrays[field.D_CELLS] = d_cells = prepared(d_cells, compute)
        run_plan(_plan(sizes, batch_sizes), kernel(cell, True, kernel_dtype, weight_hr is not None), arrays)
    results = (dx, d_weight_ih, d_bias_ih, d_weight_hh, d_bias_hh, d_weight_hr, d_hidden, d_cell)
    return _converted(results, dtype)
