"""The time loops of the Numba backend, and the Python side that allocates and calls them.

Work is cut into parts, one direction and a range of batch rows each; threads take the next part until none is
left. A part runs the whole sequence on its own, so that no thread ever waits for another. Within a time step it
goes through its rows in blocks that stay in cache: first the recurrent product of a block, then the cell's step
on it, in place on the state.
"""

import functools
import itertools

import torch
from numba import njit, types
from torch import Tensor

from ..reference import CELLS
from .numba_cells import BACKWARD, FORWARD
from .numba_compile import kernel_address, run
from .numba_simd import advance, as_pointer, fetch_and_increment, lanes, load, store
from .numba_tile import multiply, multiply_transposed, panel_width, panel_width_of

# The int64 values that a call passes to its kernel; names of arrays stand for their addresses, 0 where absent.
(
    COUNTER,
    PARTS,
    PART_TABLE,
    STEPS,
    ROWS,
    BATCH,
    BATCH_SIZES,
    DIRECTIONS,
    BLOCK_ROWS,
    HIDDEN_SIZE,
    STATE_SIZE,
) = range(11)
(GATE_SIZE, SAVED_SIZE, SCRATCH, SCRATCH_SIZE, WEIGHT_HH, WEIGHT_HR, GATES, HIDDEN_PREV, CELL_PREV) = range(11, 20)
PACKED = 20
(GATES_X, BIAS_HN, HIDDEN, CELL, OUTPUT) = range(21, 26)
(D_OUTPUT, D_HIDDEN, D_CELL, DGATES_X, DGATES_H, D_PROJECTED) = range(21, 27)

# One row of the part table: direction, whether it runs backward in time, first batch row, end of batch rows.
PART_FIELDS = 4

# Up to so many rows (time steps x sequences) the weights are used as they lie: packing them costs more than it gains.
FEW_ROWS = 8
# Multiply-adds that make another thread worth its start (a few microseconds).
WORK_PER_THREAD = 200_000
# Bytes of pre-activation gates that one block of rows may take: a share of the L2 cache.
BLOCK_BYTES = 192 * 1024

jit = njit(error_model="numpy")


@jit
def copy_rows(source, source_stride, target, target_stride, rows, columns):
    width = lanes(source)
    full = columns - columns % width
    for row in range(rows):
        for j in range(0, full, width):
            store(target, row * target_stride + j, width, load(source, row * source_stride + j, width))
        if full < columns:
            count = columns - full
            store(target, row * target_stride + full, count, load(source, row * source_stride + full, count))


@jit
def add_rows(source, source_stride, target, target_stride, rows, columns):
    width = lanes(source)
    full = columns - columns % width
    for row in range(rows):
        for j in range(0, full, width):
            total = load(target, row * target_stride + j, width) + load(source, row * source_stride + j, width)
            store(target, row * target_stride + j, width, total)
        if full < columns:
            count = columns - full
            total = load(target, row * target_stride + full, count) + load(source, row * source_stride + full, count)
            store(target, row * target_stride + full, count, total)


@jit
def rows_at(call, step):
    """How many sequences are running at time ``step``."""
    if call[BATCH_SIZES] == 0:
        return call[BATCH]
    return as_pointer(call[BATCH_SIZES], types.int64(0))[step]


@jit
def round_up(value, multiple):
    return (value + multiple - 1) // multiple * multiple


@jit
def forward_part(call, part, step_forward, zero):
    table = as_pointer(call[PART_TABLE], types.int64(0))
    direction = table[part * PART_FIELDS]
    backwards = table[part * PART_FIELDS + 1] != 0
    first = table[part * PART_FIELDS + 2]
    end = table[part * PART_FIELDS + 3]

    size, state_size, gate_size, saved_size = (
        call[HIDDEN_SIZE],
        call[STATE_SIZE],
        call[GATE_SIZE],
        call[SAVED_SIZE],
    )
    batch, directions = call[BATCH], call[DIRECTIONS]
    save, projected = call[GATES] != 0, call[WEIGHT_HR] != 0
    weight_hh = as_pointer(call[WEIGHT_HH], zero)
    # packed panels are filled up to whole ones
    packed = call[PACKED] != 0
    width = panel_width_of(weight_hh) if packed else 1
    weight_hh = advance(weight_hh, direction * state_size * round_up(gate_size, width))
    weight_hr = as_pointer(call[WEIGHT_HR], zero)
    weight_hr = advance(weight_hr, direction * size * round_up(state_size, width))
    bias_hn = advance(as_pointer(call[BIAS_HN], zero), direction * size)
    hidden = advance(as_pointer(call[HIDDEN], zero), direction * batch * state_size)
    cell = advance(as_pointer(call[CELL], zero), direction * batch * size)
    product = advance(as_pointer(call[SCRATCH], zero), part * call[SCRATCH_SIZE])
    unprojected = advance(product, call[BLOCK_ROWS] * gate_size)
    gates_x, output = as_pointer(call[GATES_X], zero), as_pointer(call[OUTPUT], zero)
    gates = as_pointer(call[GATES], zero)
    hidden_prev, cell_prev = as_pointer(call[HIDDEN_PREV], zero), as_pointer(call[CELL_PREV], zero)

    full = size - size % lanes(product)
    offset = call[ROWS] if backwards else 0
    for index in range(call[STEPS]):
        time = call[STEPS] - 1 - index if backwards else index
        running = rows_at(call, time)
        if backwards:
            offset -= running
        stop = min(end, running)
        for block in range(first, stop, call[BLOCK_ROWS]):
            rows = min(call[BLOCK_ROWS], stop - block)
            entry = (offset + block) * directions + direction
            block_hidden = advance(hidden, block * state_size)
            multiply(packed, block_hidden, state_size, rows, weight_hh, state_size, gate_size, product, gate_size)
            if save:
                target = advance(hidden_prev, entry * state_size)
                copy_rows(block_hidden, state_size, target, directions * state_size, rows, state_size)
                if call[CELL] != 0:
                    target = advance(cell_prev, entry * size)
                    copy_rows(advance(cell, block * size), size, target, directions * size, rows, size)
            for row in range(rows):
                here = entry + row * directions
                row_product, row_gates_x = (
                    advance(product, row * gate_size),
                    advance(gates_x, here * gate_size),
                )
                row_hidden = advance(unprojected if projected else block_hidden, row * size)
                row_cell = advance(cell, (block + row) * size)
                row_gates = advance(gates, here * saved_size)
                for j in range(0, full, lanes(product)):
                    step_forward(
                        row_product,
                        row_gates_x,
                        bias_hn,
                        row_hidden,
                        row_cell,
                        row_gates,
                        size,
                        j,
                        lanes(product),
                        save,
                    )
                if full < size:
                    step_forward(
                        row_product,
                        row_gates_x,
                        bias_hn,
                        row_hidden,
                        row_cell,
                        row_gates,
                        size,
                        full,
                        size - full,
                        save,
                    )
            if projected:
                multiply(packed, unprojected, size, rows, weight_hr, size, state_size, block_hidden, state_size)
            target = advance(output, entry * state_size)
            copy_rows(block_hidden, state_size, target, directions * state_size, rows, state_size)
        if not backwards:
            offset += running


@jit
def backward_part(call, part, step_backward, zero):
    table = as_pointer(call[PART_TABLE], types.int64(0))
    direction = table[part * PART_FIELDS]
    # Back-propagation walks against the direction of the forward pass.
    backwards = table[part * PART_FIELDS + 1] == 0
    first = table[part * PART_FIELDS + 2]
    end = table[part * PART_FIELDS + 3]

    size, state_size, gate_size, saved_size = (
        call[HIDDEN_SIZE],
        call[STATE_SIZE],
        call[GATE_SIZE],
        call[SAVED_SIZE],
    )
    batch, directions = call[BATCH], call[DIRECTIONS]
    projected = call[WEIGHT_HR] != 0
    weight_hh = as_pointer(call[WEIGHT_HH], zero)
    packed = call[PACKED] != 0
    width = panel_width_of(weight_hh) if packed else 1
    weight_hh = advance(weight_hh, direction * gate_size * round_up(state_size, width))
    weight_hr = as_pointer(call[WEIGHT_HR], zero)
    weight_hr = advance(weight_hr, direction * state_size * round_up(size, width))
    d_hidden = advance(as_pointer(call[D_HIDDEN], zero), direction * batch * state_size)
    d_cell = advance(as_pointer(call[D_CELL], zero), direction * batch * size)
    d_unprojected = advance(as_pointer(call[SCRATCH], zero), part * call[SCRATCH_SIZE])
    d_output, d_projected = as_pointer(call[D_OUTPUT], zero), as_pointer(call[D_PROJECTED], zero)
    gates = as_pointer(call[GATES], zero)
    hidden_prev, cell_prev = as_pointer(call[HIDDEN_PREV], zero), as_pointer(call[CELL_PREV], zero)
    dgates_x, dgates_h = as_pointer(call[DGATES_X], zero), as_pointer(call[DGATES_H], zero)
    # Only the GRU tells the two apart, and only there a share of the gradient passes the recurrent product by.
    two_sided = call[DGATES_H] != call[DGATES_X]

    full = size - size % lanes(d_hidden)
    offset = call[ROWS] if backwards else 0
    for index in range(call[STEPS]):
        time = call[STEPS] - 1 - index if backwards else index
        running = rows_at(call, time)
        if backwards:
            offset -= running
        stop = min(end, running)
        for block in range(first, stop, call[BLOCK_ROWS]):
            rows = min(call[BLOCK_ROWS], stop - block)
            entry = (offset + block) * directions + direction
            block_d_hidden = advance(d_hidden, block * state_size)
            state_stride = directions * state_size
            if call[D_OUTPUT] != 0:
                source = advance(d_output, entry * state_size)
                add_rows(source, state_stride, block_d_hidden, state_size, rows, state_size)
            if projected:
                target = advance(d_projected, entry * state_size)
                copy_rows(block_d_hidden, state_size, target, state_stride, rows, state_size)
                source, target = block_d_hidden, d_unprojected
                multiply_transposed(packed, source, state_size, rows, weight_hr, state_size, size, target, size, False)
            for row in range(rows):
                here = entry + row * directions
                row_gates = advance(gates, here * saved_size)
                row_hidden_prev, row_cell_prev = (
                    advance(hidden_prev, here * state_size),
                    advance(cell_prev, here * size),
                )
                row_dh = advance(d_unprojected if projected else block_d_hidden, row * size)
                row_dc = advance(d_cell, (block + row) * size)
                row_dx, row_dgates_h = (
                    advance(dgates_x, here * gate_size),
                    advance(dgates_h, here * gate_size),
                )
                for j in range(0, full, lanes(d_hidden)):
                    step_backward(
                        row_gates,
                        row_hidden_prev,
                        row_cell_prev,
                        row_dh,
                        row_dc,
                        row_dx,
                        row_dgates_h,
                        size,
                        j,
                        lanes(d_hidden),
                    )
                if full < size:
                    step_backward(
                        row_gates,
                        row_hidden_prev,
                        row_cell_prev,
                        row_dh,
                        row_dc,
                        row_dx,
                        row_dgates_h,
                        size,
                        full,
                        size - full,
                    )
            source = advance(dgates_h, entry * gate_size)
            stride, target = directions * gate_size, block_d_hidden
            multiply_transposed(
                packed, source, stride, rows, weight_hh, gate_size, state_size, target, state_size, two_sided
            )
        if not backwards:
            offset += running


def _build(part_loop, step, dtype):
    """The function to compile for one cell, pass and dtype: threads take parts until none is left."""
    zero = types.float32(0) if dtype == torch.float32 else types.float64(0)

    def kernel(call):
        while True:
            part = fetch_and_increment(call, COUNTER)
            if part >= call[PARTS]:
                break
            part_loop(call, part, step, zero)

    return kernel


def _kernel(cell: str, backward: bool, dtype: torch.dtype) -> int:
    name = f"{cell}_{'backward' if backward else 'forward'}_{str(dtype).removeprefix('torch.')}"
    part_loop, step = (backward_part, BACKWARD[cell]) if backward else (forward_part, FORWARD[cell])
    return kernel_address(name, functools.partial(_build, part_loop, step, dtype))


def pack(weight: Tensor) -> Tensor:
    """(D, N, K) weights of products ``a @ weight.T`` in the panels that ``multiply`` reads: (D, panels, K, width)."""
    directions, columns, depth = weight.shape
    width = panel_width(weight.element_size())
    panels = -(-columns // width)
    if columns % width:
        padded = weight.new_zeros(directions, panels * width, depth)
        padded[:, :columns] = weight
        weight = padded
    return weight.reshape(directions, panels, width, depth).transpose(2, 3).contiguous()


def _arrange(rows: int, weight_hh: Tensor, weight_hr: Tensor | None, dtype: torch.dtype, transposed: bool):
    """The weights in ``dtype`` as the kernels take them: in panels (of the transposes), or as they lie for few rows."""

    def arrange(weight: Tensor | None) -> Tensor | None:
        if weight is None:
            return None
        weight = weight.to(dtype)
        if rows <= FEW_ROWS:
            return weight.contiguous()
        return pack(weight.transpose(1, 2) if transposed else weight)

    return arrange(weight_hh), arrange(weight_hr)


def _part_table(batch: int, batch_sizes: Tensor | None, reverse: list[int], threads: int) -> tuple[Tensor, int]:
    """Directions x ranges of batch rows, about as many as there are threads, with equal numbers of rows over time."""
    chunks = max(1, min(batch, -(-threads // len(reverse))))
    bounds = [batch * chunk // chunks for chunk in range(chunks + 1)]
    if batch_sizes is not None and chunks > 1:
        # sequences are sorted by falling length: row b runs in all steps but those whose batch size is at most b
        ended = torch.bincount(batch_sizes, minlength=batch + 1)[:batch].cumsum(0)
        work = (len(batch_sizes) - ended).cumsum(0)
        shares = work[-1] * torch.arange(1, chunks) / chunks
        bounds = [0, *(torch.searchsorted(work, shares) + 1).tolist(), batch]
    table = [
        (direction, backwards, first, end)
        for first, end in itertools.pairwise(bounds)
        for direction, backwards in enumerate(reverse)
        if end > first
    ]
    return torch.tensor(table, dtype=torch.int64), len(table)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _shared_values(like, batch, batch_sizes, reverse, sizes, scratch_columns, weights, reserve):
    """What every kernel is passed first (COUNTER to PACKED), the number of threads, and what must outlive the call."""
    rows, directions, _ = like.shape
    _, state_size, gate_size, _ = sizes
    work = rows * directions * gate_size * state_size
    threads = max(1, min(torch.get_num_threads(), work // WORK_PER_THREAD))
    table, parts = _part_table(batch, batch_sizes, reverse, threads)
    block_rows = max(6, min(96, BLOCK_BYTES // (gate_size * like.element_size()) // 6 * 6))
    block_rows = min(block_rows, batch)
    scratch = like.new_empty(parts, block_rows * scratch_columns)
    batch_sizes = None if batch_sizes is None else batch_sizes.contiguous()
    steps = rows // batch if batch_sizes is None else len(batch_sizes)
    values = (
        *(0, parts, table.data_ptr(), steps, rows, batch, _address(batch_sizes), directions, block_rows),
        *(*sizes, scratch.data_ptr(), block_rows * scratch_columns),
        *map(_address, (*weights, *reserve)),
        rows > FEW_ROWS,
    )
    return values, min(threads, parts), (table, scratch, batch_sizes)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def can_run(call) -> str | None:
    """Why this backend cannot run ``call``, or None if it can."""
    if call.device != "cpu":
        return f"it runs on the CPU, the input is on {call.device}"
    if call.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"it computes in floating point, the input is {call.dtype}"
    return None


def scan_forward(
    cell: str,
    gates_x: Tensor,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    bias_hn: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: list[int],
    save: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Run a layer's time loop; see ``fastrnn.ops`` for shapes. Absent results are None."""
    dtype = gates_x.dtype
    compute = _compute_dtype(dtype)
    rows, directions, gate_size = gates_x.shape
    batch, state_size = h0.shape[1:]
    size = state_size if weight_hr is None else weight_hr.shape[2]
    saved_size = CELLS[cell].saved * size

    gates_x = gates_x.to(compute).contiguous()
    bias_hn = None if bias_hn is None else bias_hn.to(compute).contiguous()
    hidden = h0.to(compute, copy=True, memory_format=torch.contiguous_format)
    cell_state = None if c0 is None else c0.to(compute, copy=True, memory_format=torch.contiguous_format)
    output = gates_x.new_empty(rows, directions * state_size)
    gates = hidden_prev = cell_prev = None
    if save:
        gates = gates_x.new_empty(rows, directions, saved_size)
        hidden_prev = gates_x.new_empty(rows, directions, state_size)
        cell_prev = None if c0 is None else gates_x.new_empty(rows, directions, size)

    if rows:
        weights = _arrange(rows, weight_hh, weight_hr, compute, transposed=False)
        reserve = (gates, hidden_prev, cell_prev)
        sizes = (size, state_size, gate_size, saved_size)
        shared, threads, _keep = _shared_values(
            gates_x, batch, batch_sizes, reverse, sizes, gate_size + size, weights, reserve
        )
        arrays = (gates_x, bias_hn, hidden, cell_state, output)
        run(_kernel(cell, False, compute), (*shared, *map(_address, arrays)), threads)
    results = (output, hidden, cell_state, gates, hidden_prev, cell_prev)
    return tuple(None if result is None else result.to(dtype) for result in results)


def scan_backward(
    cell: str,
    d_output: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    gates: Tensor,
    hidden_prev: Tensor,
    cell_prev: Tensor | None,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    batch: int,
    batch_sizes: Tensor | None,
    reverse: list[int],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """Back-propagate through a layer's time loop; see ``fastrnn.ops`` for shapes. Absent results are None."""
    dtype = gates.dtype
    compute = _compute_dtype(dtype)
    rows, directions, saved_size = gates.shape
    gate_size, state_size = weight_hh.shape[1:]
    size = state_size if weight_hr is None else weight_hr.shape[2]

    def prepare(tensor):
        return None if tensor is None else tensor.to(compute).contiguous()

    def state_gradient(tensor, columns):
        if tensor is None:
            return gates.new_zeros(directions, batch, columns)
        return tensor.to(compute, copy=True, memory_format=torch.contiguous_format)

    gates, hidden_prev, cell_prev = prepare(gates), prepare(hidden_prev), prepare(cell_prev)
    d_output = prepare(d_output)
    d_hidden = state_gradient(d_h_n, state_size)
    d_cell = None if cell_prev is None else state_gradient(d_c_n, size)
    dgates_x = gates.new_empty(rows, directions, gate_size)
    dgates_h = gates.new_empty(rows, directions, gate_size) if cell == "gru" else None
    d_projected = None if weight_hr is None else gates.new_empty(rows, directions, state_size)

    if rows:
        weights = _arrange(rows, weight_hh, weight_hr, compute, transposed=True)
        reserve = (gates, hidden_prev, cell_prev)
        sizes = (size, state_size, gate_size, saved_size)
        shared, threads, _keep = _shared_values(gates, batch, batch_sizes, reverse, sizes, size, weights, reserve)
        arrays = (d_output, d_hidden, d_cell, dgates_x, dgates_x if dgates_h is None else dgates_h, d_projected)
        run(_kernel(cell, True, compute), (*shared, *map(_address, arrays)), threads)
    results = (dgates_x, dgates_h, d_projected, d_hidden, d_cell)
    return tuple(None if result is None else result.to(dtype) for result in results)
