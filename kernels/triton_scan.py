"""The time loops in Triton, forward and backward: one launch for all steps and all directions.

The programs of a launch stand in a grid (blocks of hidden units, pairs of a group and a tile of the batch). A pair's
programs share its hidden units. Before the loop each loads its share of W_hh, chunk by chunk along the depth of the
product, as far as there is room for it on chip (RESIDENT chunks of CHUNKS; the others are streamed at every step); then
step by step it

* forward: reads the whole hidden state of its rows, multiplies it with its share of the weights, makes its units' step;
* backward: makes its units' step, reads the gradients of all gates of its rows, and multiplies them likewise.

ALONE: one block has all units. State and gradients pass from step to step on chip and nobody waits.

Otherwise the programs of a pair exchange hidden states, or gates' gradients, through memory: each stores its part and
arrives at the pair's counter, and reads when all have arrived. For that all of them must run at the same time: the
caller launches no more programs than that holds for, or one step at a time (``begin``, ``end``), with no wait at all.

A product's depth is split SPLITS ways, as a batch of smaller products that are added up at the end: Triton gives each
of a batch's products to a warp of its own, and so cuts the chain of dependent multiply-adds.
"""

import os

import triton
import triton.language as tl

from .triton_cells import backward_step, forward_step

# Triton's interpreter runs kernels on CPU tensors, one program after another: nobody may wait for another. It takes
# bfloat16 for whole numbers in products, and converts it wrongly (cut off in place of rounded, zero to 1e-38): what
# ``_multiply``, ``_narrow`` and ``_widen`` mend.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"))

# Sizes of one call: arguments of the same kernel, whatever their value.
OF_THE_CALL = ["groups", "batch", "steps", "begin", "end", "first_pair", "tiles", "reverse", "period"]


@triton.jit
def _arrive(counter):
    tl.debug_barrier()  # what all threads stored comes before the one thread's release
    tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def _wait(counter, arrivals):
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < arrivals:
        pass
    tl.debug_barrier()


@triton.jit
def _narrow(tile, DTYPE: tl.constexpr):
    """The tile in DTYPE, rounded to the nearest."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = tile.to(tl.uint32, bitcast=True)
        rounded = tl.where(tile == tile, bits + 0x7FFF + ((bits >> 16) & 1), bits)
        return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return tile.to(DTYPE)


@triton.jit
def _widen(tile, DTYPE: tl.constexpr):
    if INTERPRETED and tile.dtype == tl.bfloat16:
        bits = tile.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    else:
        return tile.to(DTYPE)


@triton.jit
def _rows_at(offsets, time, batch, PACKED: tl.constexpr):
    """First row of a time step, and how many sequences run."""
    if PACKED:
        start = tl.load(offsets + time)
        running = (tl.load(offsets + time + 1) - start).to(tl.int32)
    else:
        start = time.to(tl.int64) * batch
        running = batch
    return start, running


@triton.jit
def _load_tiles(pointer, rows, units, mask, H: tl.constexpr, COUNT: tl.constexpr, ACC: tl.constexpr):
    """COUNT blocks of H values of every row: one tile of each."""
    tiles = ()
    for block in tl.static_range(COUNT):
        offsets = rows[:, None] * (COUNT * H) + block * H + units[None, :]
        tiles += (_widen(tl.load(pointer + offsets, mask=mask, other=0.0), ACC),)
    return tiles


@triton.jit
def _store_tiles(pointer, tiles, rows, units, mask, H: tl.constexpr, COUNT: tl.constexpr):
    for block in tl.static_range(COUNT):
        offsets = rows[:, None] * (COUNT * H) + block * H + units[None, :]
        tl.store(pointer + offsets, _narrow(tiles[block], pointer.dtype.element_ty), mask=mask)


@triton.jit
def _depth(chunk, CHUNK: tl.constexpr, SPLITS: tl.constexpr):
    """The places of a chunk along the depth, (SPLITS, CHUNK / SPLITS)."""
    PART: tl.constexpr = CHUNK // SPLITS
    return chunk * CHUNK + tl.arange(0, SPLITS)[:, None] * PART + tl.arange(0, PART)[None, :]


@triton.jit
def _multiply(operand, weights, sums, PRECISION: tl.constexpr):
    if INTERPRETED:
        operand, weights = _widen(operand, sums.dtype), _widen(weights, sums.dtype)
    BATCH: tl.constexpr = sums.shape[0]
    ROWS: tl.constexpr = sums.shape[1]
    if BATCH == 1 and ROWS >= 64:
        # Hopper's warp groups (wgmma) take matrices of 64 rows, but no batch of them
        DEPTH: tl.constexpr = weights.shape[1]
        COLUMNS: tl.constexpr = weights.shape[2]
        operand, weights = tl.reshape(operand, [ROWS, DEPTH]), tl.reshape(weights, [DEPTH, COLUMNS])
        flat = tl.reshape(sums, [ROWS, COLUMNS])
        flat = tl.dot(operand, weights, flat, input_precision=PRECISION, out_dtype=sums.dtype)
        return tl.reshape(flat, [1, ROWS, COLUMNS])
    else:
        return tl.dot(operand, weights, sums, input_precision=PRECISION, out_dtype=sums.dtype)


@triton.jit
def _add_up(sums, SPLITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    if SPLITS == 1:
        return tl.reshape(sums, [ROWS, COLUMNS])
    else:
        return tl.sum(sums, 0)


@triton.jit
def _split_over_depth(tile, ROWS: tl.constexpr, DEPTH: tl.constexpr, SPLITS: tl.constexpr):
    """A tile on chip, (ROWS, DEPTH), as the batch of operands of a product."""
    return tl.permute(tl.reshape(tile, [ROWS, SPLITS, DEPTH // SPLITS]), [1, 0, 2])


@triton.jit
def _zero_at_resets(tile, resets, there):
    """The tile with zeros in the rows whose state is reset."""
    reset = tl.load(resets, mask=there, other=0) != 0
    return tl.where(reset[:, None], tl.zeros_like(tile), tile)


# Columns of a forward product: four of every unit, its gates, so that they meet in one thread; the GRU's fourth is
# empty. The RNN has one.


@triton.jit
def _gates_of(product, ROWS: tl.constexpr, UNITS: tl.constexpr, GATES: tl.constexpr):
    if GATES == 1:
        return (product,)
    else:
        even, odd = tl.split(tl.reshape(product, [ROWS, UNITS, 2, 2]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return first, second, third, fourth


@triton.jit
def _side_by_side(gates, ROWS: tl.constexpr, UNITS: tl.constexpr, GATES: tl.constexpr):
    """The inverse of ``_gates_of``."""
    if GATES == 1:
        return gates[0]
    else:
        even, odd = tl.join(gates[0], gates[2]), tl.join(gates[1], gates[3])
        return tl.reshape(tl.join(even, odd), [ROWS, UNITS * 4])


@triton.jit
def _forward_weights(weight, block, chunk, H: tl.constexpr, GATES: tl.constexpr, UNITS: tl.constexpr,
                     CHUNK: tl.constexpr, SPLITS: tl.constexpr):  # fmt: skip
    """W_hh of the units of a block, (SPLITS, depth, columns), depth counting hidden units."""
    WIDTH: tl.constexpr = 1 if GATES == 1 else 4
    column = tl.arange(0, UNITS * WIDTH)
    unit, gate = block * UNITS + column // WIDTH, column % WIDTH
    depth = _depth(chunk, CHUNK, SPLITS)[:, :, None]
    mask = (depth < H) & (((unit < H) & (gate < GATES))[None, None, :])
    return tl.load(weight + (gate * H + unit)[None, None, :] * H + depth, mask=mask, other=0.0)


@triton.jit
def _backward_weights(weight, block, chunk, H: tl.constexpr, GATES: tl.constexpr, UNITS: tl.constexpr,
                      CHUNK: tl.constexpr, SPLITS: tl.constexpr, ALONE: tl.constexpr):  # fmt: skip
    """W_hh to the units of a block, (SPLITS, depth, columns); depth counts gates, or if ALONE units and their gates."""
    unit = block * UNITS + tl.arange(0, UNITS)
    depth = _depth(chunk, CHUNK, SPLITS)[:, :, None]
    if ALONE and GATES > 1:
        row, there = depth % 4 * H + depth // 4, (depth % 4 < GATES) & (depth // 4 < H)
    else:
        row, there = depth, depth < GATES * H
    return tl.load(weight + row * H + unit[None, None, :], mask=there & (unit < H)[None, None, :], other=0.0)


@triton.jit
def _weights(weight, block, chunk, BACKWARD: tl.constexpr, H: tl.constexpr, GATES: tl.constexpr, UNITS: tl.constexpr,
             CHUNK: tl.constexpr, SPLITS: tl.constexpr, ALONE: tl.constexpr):  # fmt: skip
    if BACKWARD:
        return _backward_weights(weight, block, chunk, H, GATES, UNITS, CHUNK, SPLITS, ALONE)
    else:
        return _forward_weights(weight, block, chunk, H, GATES, UNITS, CHUNK, SPLITS)


@triton.jit
def _load_chunks(weight, block, BACKWARD: tl.constexpr, H: tl.constexpr, GATES: tl.constexpr, UNITS: tl.constexpr,
                 CHUNK: tl.constexpr, SPLITS: tl.constexpr, ALONE: tl.constexpr, COUNT: tl.constexpr):  # fmt: skip
    """The first COUNT chunks of the weights, to be kept on chip."""
    chunks = ()
    for chunk in tl.static_range(COUNT):
        chunks += (_weights(weight, block, chunk, BACKWARD, H, GATES, UNITS, CHUNK, SPLITS, ALONE),)
    return chunks


@triton.jit
def _multiply_chunks(source, there, resident, weight, block, sums, BACKWARD: tl.constexpr, H: tl.constexpr,
                     GATES: tl.constexpr, UNITS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
                     SPLITS: tl.constexpr, IN_FLIGHT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """``sums`` and the product of all chunks: rows of memory at ``source`` with the weights, resident ones first."""
    DEPTH: tl.constexpr = GATES * H if BACKWARD else H
    RESIDENT: tl.constexpr = len(resident)
    # Loads are issued ahead of the products, all of them if nothing stopped it: no more than there are registers for.
    for chunk in tl.static_range(RESIDENT):
        if chunk % IN_FLIGHT == IN_FLIGHT - 1:
            tl.debug_barrier()
        operand = _load_operand(source, there, chunk, DEPTH, (chunk + 1) * CHUNK <= DEPTH, CHUNK, SPLITS)
        sums = _multiply(operand, resident[chunk], sums, PRECISION)
    for streamed in tl.range(RESIDENT, CHUNKS, num_stages=2):
        operand = _load_operand(source, there, streamed, DEPTH, DEPTH % CHUNK == 0, CHUNK, SPLITS)
        weights = _weights(weight, block, streamed, BACKWARD, H, GATES, UNITS, CHUNK, SPLITS, False)
        sums = _multiply(operand, weights, sums, PRECISION)
    return sums


@triton.jit
def _load_operand(source, there, chunk, DEPTH: tl.constexpr, WHOLE: tl.constexpr, CHUNK: tl.constexpr,
                  SPLITS: tl.constexpr):  # fmt: skip
    """One chunk of the rows at ``source``; WHOLE: it ends before DEPTH does."""
    depth = _depth(chunk, CHUNK, SPLITS)[:, None, :]
    mask = there[None, :, None]
    if not WHOLE:
        mask = mask & (depth < DEPTH)
    return tl.load(source + depth, mask=mask, other=0.0)


@triton.jit(do_not_specialize=OF_THE_CALL)
def forward_scan(
    gates_x, weight_hh, bias_hn, offsets, resets,
    exchange, hidden, cell, output, gates, hidden_prev, cell_prev, cells, counters,
    groups, batch, steps, begin, end, first_pair, tiles, reverse, period,
    CELL: tl.constexpr, H: tl.constexpr, GATES: tl.constexpr, SAVED: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    RESIDENT: tl.constexpr, IN_FLIGHT: tl.constexpr, ALONE: tl.constexpr, PACKED: tl.constexpr, SAVE: tl.constexpr,
    WITH_RESETS: tl.constexpr, WITH_CELLS: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Steps ``begin`` to ``end`` in the order of the recurrence.

    gates_x (rows, D, GATES * H); weight_hh (D, GATES * H, H); bias_hn (D, H); offsets (T + 1,) int64, the first row of
    each step. exchange (2, D, B, H): the hidden state before even and before odd steps. hidden, cell (D, B, H): the
    state before ``begin`` and, afterwards, before ``end``. output, cells (rows, D, H) and the reserve are as in ops.py.
    counters: one int32 of every pair, 32 apart, zero at first. Group d walks back in time if bit d modulo ``period`` of
    ``reverse`` is set.
    """
    block, pair = tl.program_id(0), first_pair + tl.program_id(1)
    group, tile = pair // tiles, pair % tiles
    ACC: tl.constexpr = hidden.dtype.element_ty
    COLUMNS: tl.constexpr = UNITS if GATES == 1 else UNITS * 4
    rows = tile * ROWS + tl.arange(0, ROWS)
    units = block * UNITS + tl.arange(0, UNITS)
    there = (rows < batch)[:, None] & (units < H)[None, :]
    state = (group.to(tl.int64) * batch + rows)[:, None] * H + units[None, :]
    state_rows = ((group.to(tl.int64) * batch + rows) * H)[None, :, None]
    slot_size = groups.to(tl.int64) * batch * H
    backwards = (reverse >> (group % period)) & 1 != 0
    weight = weight_hh + group.to(tl.int64) * (GATES * H * H)
    counter = counters + pair * 32

    resident = _load_chunks(weight, block, False, H, GATES, UNITS, CHUNK, SPLITS, ALONE, RESIDENT)
    h = tl.load(hidden + state, mask=there, other=0.0)
    c = h
    if CELL == "lstm":
        c = tl.load(cell + state, mask=there, other=0.0)
    bias = tl.zeros([1, UNITS], ACC)
    if CELL == "gru":
        bias = _widen(tl.load(bias_hn + group * H + units, mask=units < H, other=0.0), ACC)[None, :]

    for index in range(begin, end):
        time = tl.where(backwards, steps - 1 - index, index)
        start, running = _rows_at(offsets, time, batch, PACKED)
        entries = (start + rows) * groups + group
        mask = there & (rows < running)[:, None]
        x = _load_tiles(gates_x, entries, units, mask, H, GATES, ACC)

        sums = tl.zeros([SPLITS, ROWS, COLUMNS], ACC)
        if ALONE:
            operand = _split_over_depth(_narrow(h, weight_hh.dtype.element_ty), ROWS, CHUNK, SPLITS)
            sums = _multiply(operand, resident[0], sums, PRECISION)
        else:
            if index > begin:
                _wait(counter, (index - begin) * tl.num_programs(0))
            sums = _multiply_chunks(
                exchange + index % 2 * slot_size + state_rows, rows < batch, resident, weight, block, sums,
                False, H, GATES, UNITS, CHUNK, CHUNKS, SPLITS, IN_FLIGHT, PRECISION,
            )  # fmt: skip
        products = _gates_of(_add_up(sums, SPLITS, ROWS, COLUMNS), ROWS, UNITS, GATES)
        saved, new_h, new_c = forward_step(CELL, products, x, bias, h, c, EXACT)

        # the state of a sequence that does not run stays as it is
        old_h, old_c = h, c
        out = tl.where(mask, new_h, h)
        h, c = out, tl.where(mask, new_c, c)
        if WITH_CELLS:
            _store_tiles(cells, (c,), entries, units, mask, H, 1)
        if WITH_RESETS:
            # beyond the last step nothing runs, and no address is read
            following = tl.where(index + 1 < steps, tl.where(backwards, time - 1, time + 1), time)
            start, running = _rows_at(offsets, following, batch, PACKED)
            running = tl.where(index + 1 < steps, running, 0)
            next_entries = (start + rows) * groups + group
            h = _zero_at_resets(h, resets + next_entries, rows < running)
            c = _zero_at_resets(c, resets + next_entries, rows < running)
        if not ALONE:
            # before all other stores, which an arrival would wait for
            target = exchange + (index + 1) % 2 * slot_size + state
            tl.store(target, _narrow(h, exchange.dtype.element_ty), mask=there)
            if index + 1 < end:
                _arrive(counter)
        _store_tiles(output, (out,), entries, units, mask, H, 1)
        if SAVE:
            _store_tiles(gates, saved, entries, units, mask, H, SAVED)
            _store_tiles(hidden_prev, (old_h,), entries, units, mask, H, 1)
            if CELL == "lstm":
                _store_tiles(cell_prev, (old_c,), entries, units, mask, H, 1)

    tl.store(hidden + state, h, mask=there)
    if CELL == "lstm":
        tl.store(cell + state, c, mask=there)


@triton.jit(do_not_specialize=OF_THE_CALL)
def backward_scan(
    gates, hidden_prev, cell_prev, d_output, d_cells, weight_hh, offsets, resets,
    dgates, d_hidden, d_cell, counters,
    groups, batch, steps, begin, end, first_pair, tiles, reverse, period,
    CELL: tl.constexpr, H: tl.constexpr, GATES: tl.constexpr, SAVED: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    RESIDENT: tl.constexpr, IN_FLIGHT: tl.constexpr, ALONE: tl.constexpr, PACKED: tl.constexpr,
    WITH_D_OUTPUT: tl.constexpr, WITH_D_CELLS: tl.constexpr, WITH_RESETS: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Rounds ``begin`` to ``end``, one for each step from the last to the first.

    If not ALONE, a round begins with the product of the gates' gradients of the round before, and one more round than
    there are steps does nothing else. dgates (rows, D, SAVED * H), blocks as ``backward_step`` has them; d_hidden,
    d_cell (D, B, H): gradients of the state before ``begin`` and afterwards; the rest is as in ``forward_scan``.
    """
    block, pair = tl.program_id(0), first_pair + tl.program_id(1)
    group, tile = pair // tiles, pair % tiles
    ACC: tl.constexpr = d_hidden.dtype.element_ty
    rows = tile * ROWS + tl.arange(0, ROWS)
    units = block * UNITS + tl.arange(0, UNITS)
    there = (rows < batch)[:, None] & (units < H)[None, :]
    state = (group.to(tl.int64) * batch + rows)[:, None] * H + units[None, :]
    backwards = (reverse >> (group % period)) & 1 != 0
    weight = weight_hh + group.to(tl.int64) * (GATES * H * H)
    counter = counters + pair * 32
    # the blocks that act on the hidden state are the last GATES
    FIRST: tl.constexpr = (SAVED - GATES) * H

    resident = _load_chunks(weight, block, True, H, GATES, UNITS, CHUNK, SPLITS, ALONE, RESIDENT)
    dh = tl.load(d_hidden + state, mask=there, other=0.0)
    dc = dh
    if CELL == "lstm":
        dc = tl.load(d_cell + state, mask=there, other=0.0)

    for index in range(begin, end):
        # beyond the last step nothing runs, and no address is read
        step = tl.minimum(index, steps - 1)
        time = tl.where(backwards, step, steps - 1 - step)
        start, running = _rows_at(offsets, time, batch, PACKED)
        entries = (start + rows) * groups + group
        running = tl.where(index < steps, running, 0)
        mask = there & (rows < running)[:, None]
        saved = _load_tiles(gates, entries, units, mask, H, SAVED, ACC)
        h_prev = saved[0]
        if CELL == "gru":
            h_prev = _load_tiles(hidden_prev, entries, units, mask, H, 1, ACC)[0]
        c_prev = saved[0]
        if CELL == "lstm":
            c_prev = _load_tiles(cell_prev, entries, units, mask, H, 1, ACC)[0]
        d_out = tl.zeros([ROWS, UNITS], ACC)
        if WITH_D_OUTPUT:
            d_out = _load_tiles(d_output, entries, units, mask, H, 1, ACC)[0]
        if WITH_D_CELLS:
            dc += _load_tiles(d_cells, entries, units, mask, H, 1, ACC)[0]

        if not ALONE:  # noqa: SIM102, a constant is looked at first
            if index > 0:
                if index > begin:
                    _wait(counter, (index - begin) * tl.num_programs(0))
                before = tl.where(backwards, index - 1, steps - index)
                source_start, source_running = _rows_at(offsets, before, batch, PACKED)
                source_entries = (source_start + rows) * groups + group
                source_rows = source_entries * (SAVED * H) + FIRST
                sums = _multiply_chunks(
                    dgates + source_rows[None, :, None], (rows < batch) & (rows < source_running), resident,
                    weight, block, tl.zeros([SPLITS, ROWS, UNITS], ACC),
                    True, H, GATES, UNITS, CHUNK, CHUNKS, SPLITS, IN_FLIGHT, PRECISION,
                )  # fmt: skip
                dh += _add_up(sums, SPLITS, ROWS, UNITS)
                if WITH_RESETS:
                    dh = _zero_at_resets(dh, resets + source_entries, rows < source_running)

        d_gates, past_weights, new_dc = backward_step(CELL, saved, h_prev, c_prev, dh + d_out, dc, EXACT)
        _store_tiles(dgates, d_gates, entries, units, mask, H, SAVED)
        dh = tl.where(mask, past_weights, dh)
        dc = tl.where(mask, new_dc, dc)
        if WITH_RESETS:
            dc = _zero_at_resets(dc, resets + entries, rows < running)
        if ALONE:
            operand = _side_by_side(_on_the_hidden_side(d_gates, mask, GATES, SAVED), ROWS, UNITS, GATES)
            operand = _split_over_depth(_narrow(operand, weight_hh.dtype.element_ty), ROWS, CHUNK, SPLITS)
            sums = tl.zeros([SPLITS, ROWS, UNITS], ACC)
            dh += _add_up(_multiply(operand, resident[0], sums, PRECISION), SPLITS, ROWS, UNITS)
            if WITH_RESETS:
                dh = _zero_at_resets(dh, resets + entries, rows < running)
        elif index + 1 < end:
            _arrive(counter)

    tl.store(d_hidden + state, dh, mask=there)
    if CELL == "lstm":
        tl.store(d_cell + state, dc, mask=there)


@triton.jit
def _on_the_hidden_side(d_gates, mask, GATES: tl.constexpr, SAVED: tl.constexpr):
    """The gradients of the gates that W_hh acts on, zero where nothing runs, four of them if there is more than one."""
    tiles = ()
    for block in tl.static_range(SAVED - GATES, SAVED):
        tiles += (tl.where(mask, d_gates[block], tl.zeros_like(d_gates[block])),)
    if GATES == 3:
        tiles += (tl.zeros_like(tiles[0]),)
    return tiles
