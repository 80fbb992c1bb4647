"""The matrix product behind every kernel: register tiles of LLVM vector code, and the packing of weights for them.

A tile of up to 8 rows x 4 vectors of columns stays in registers over the whole depth of the product. The weights are
packed into panels of as many columns, ``panel[k * line + column]``, so that the inner loop reads them in order. The
vectors of a panel are either neighbours (``vector_stride`` = ``column_step`` = the lanes of a vector) or hold the
gates of the same hidden units (``vector_stride`` = the hidden size, ``column_step`` = 0), which one thread then owns
as a whole. The last panel of neighbours is narrower where it would be half empty.

Strides count elements. Every sum runs over k in the same order whatever the tile, so that results do not depend on how
rows and columns are shared out.
"""

from typing import NamedTuple

import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .numba_pairs import dot_of_pairs, pack_lines_in_pairs, pack_rows_in_pairs, pairs_in, rows_in_pairs
from .numba_simd import (
    MANY_REGISTERS,
    VECTOR_BYTES,
    advance,
    broadcast,
    fetch,
    fused_multiply_add,
    jit,
    lane_mask,
    lanes,
    load,
    masked_load,
    masked_store,
    named_jit,
    prefetch,
    store,
    store_transposed,
)

# Rows of the largest tile for a number of vectors: accumulators, one line of weights and a broadcast value fit into 32
# or 16 registers, and there are enough accumulators to hide the latency of a multiply-add.
_TILE_ROWS = {1: 8, 2: 8, 3: 8, 4: 6} if MANY_REGISTERS else {1: 8, 2: 6, 3: 4, 4: 2}
# Columns of a panel of neighbours, in vectors.
WIDE = 4 if MANY_REGISTERS else 2
# Longer sums are made of parts of this length: one float32 sum over a thousand products had 2.5 times torch's error. It
# also keeps a panel of one part in the L2 cache.
DEPTH_BLOCK = 256
# What a tile asks for of the next weights while it goes through a line of its own.
FETCHED_BYTES, CACHE_LINE = 128, 64


@intrinsic(prefer_literal=True)
def _tile(
    typingctx,
    rows,
    vectors,
    packed,
    a,
    a_stride,
    a_step,
    panel,
    line_size,
    depth,
    ahead,
    ahead_step,
    out,
    out_stride,
    vector_stride,
    columns,
    column_step,
    addend,
    addend_stride,
    add,
):
    """One tile: ``out[r * out_stride + v * vector_stride + lane] = sum_k a[r * a_stride + k * a_step] * weight_k``.

    ``weight_k`` is the value at ``panel[k * line_size + v * lanes + lane]``. Vector v has ``columns - v *
    column_step`` columns, as far as lanes go. With ``add`` the value at ``addend``, laid out as ``out`` but for the
    stride of its rows, is added. ``rows``, ``vectors`` and ``packed`` are literals. Packed panels may be read beyond
    ``columns``, others may not. With a packed panel FETCHED_BYTES from ``ahead[k * ahead_step]`` on are asked for. If
    ``a`` and a packed panel are pairs of bfloat16, k counts pairs, and out is float32.
    """
    literals = isinstance(rows, types.IntegerLiteral) and isinstance(vectors, types.IntegerLiteral)
    if not literals or not isinstance(packed, types.BooleanLiteral):
        return None
    row_count, vector_count, alignment = rows.literal_value, vectors.literal_value, a.dtype.bitwidth // 8
    paired = a.dtype == types.int32
    scalar = ir.DoubleType() if a.dtype == types.float64 else ir.FloatType()
    lane_count = VECTOR_BYTES // alignment
    vector = ir.VectorType(scalar, lane_count)
    operand = ir.VectorType(ir.IntType(32), lane_count) if paired else vector
    multiply_add = dot_of_pairs if paired else fused_multiply_add
    index = ir.IntType(64)

    def codegen(context, builder, sig, args):
        a, a_stride, a_step, panel, line_size, depth, ahead, ahead_step = args[3:11]
        out, out_stride, vector_stride, columns, column_step, addend, addend_stride, add = args[11:]
        a_rows, out_rows, addend_rows = (
            [builder.gep(pointer, [builder.mul(stride, index(r))]) for r in range(row_count)]
            for pointer, stride in ((a, a_stride), (out, out_stride), (addend, addend_stride))
        )
        counts = [builder.sub(columns, builder.mul(column_step, index(v))) for v in range(vector_count)]
        masks = [lane_mask(builder, count, lane_count) for count in counts]
        spots = [(r, v) for r in range(row_count) for v in range(vector_count)]

        zero = ir.Constant(vector, None)
        before_loop = builder.block
        loop = builder.append_basic_block("tile.depth")
        after = builder.append_basic_block("tile.done")
        builder.branch(loop)
        builder.position_at_end(loop)
        k, a_offset, line_offset, ahead_offset = (builder.phi(index) for _ in range(4))
        sums = [builder.phi(vector) for _ in spots]
        for counter in (k, a_offset, line_offset, ahead_offset):
            counter.add_incoming(index(0), before_loop)
        for total in sums:
            total.add_incoming(zero, before_loop)

        line = builder.gep(panel, [line_offset])
        weights = []
        for v in range(vector_count):
            spot = builder.gep(line, [index(v * lane_count)])
            if packed.literal_value:
                weights.append(builder.load(builder.bitcast(spot, operand.as_pointer()), align=alignment))
            else:
                weights.append(masked_load(builder, vector, spot, masks[v]))
        # a tile of few rows reads as fast as it can: requests would only delay it
        if packed.literal_value and row_count >= 4:
            for offset in range(0, FETCHED_BYTES, CACHE_LINE):
                prefetch(builder, builder.gep(ahead, [builder.add(ahead_offset, index(offset // alignment))]))
        activations = [broadcast(builder, builder.load(builder.gep(row, [a_offset])), lane_count) for row in a_rows]
        updated = [
            multiply_add(builder, activations[r], weights[v], total) for (r, v), total in zip(spots, sums, strict=True)
        ]
        following = builder.add(k, index(1))
        k.add_incoming(following, loop)
        a_offset.add_incoming(builder.add(a_offset, a_step), loop)
        line_offset.add_incoming(builder.add(line_offset, line_size), loop)
        ahead_offset.add_incoming(builder.add(ahead_offset, ahead_step), loop)
        for total, update in zip(sums, updated, strict=True):
            total.add_incoming(update, loop)
        builder.cbranch(builder.icmp_signed("<", following, depth), loop, after)

        builder.position_at_end(after)
        offsets = [builder.mul(vector_stride, index(v)) for v in range(vector_count)]
        targets = [builder.gep(out_rows[r], [offsets[v]]) for r, v in spots]
        sources = [builder.gep(addend_rows[r], [offsets[v]]) for r, v in spots]
        # added last: a sum that starts from a large value loses the digits of the small ones
        with builder.if_else(builder.icmp_signed(">=", counts[-1], index(lane_count))) as (full, partial):
            with full, builder.if_else(add) as (adding, storing):
                with adding:
                    for total, target, source in zip(updated, targets, sources, strict=True):
                        before = builder.load(builder.bitcast(source, vector.as_pointer()), align=alignment)
                        spot = builder.bitcast(target, vector.as_pointer())
                        builder.store(builder.fadd(total, before), spot, align=alignment)
                with storing:
                    for total, target in zip(updated, targets, strict=True):
                        builder.store(total, builder.bitcast(target, vector.as_pointer()), align=alignment)
            with partial:
                for (_, v), total, target, source in zip(spots, updated, targets, sources, strict=True):
                    wanted = builder.and_(masks[v], broadcast(builder, add, lane_count))
                    total = builder.fadd(total, masked_load(builder, vector, source, wanted))
                    masked_store(builder, total, target, masks[v])
        return context.get_dummy_value()

    i64 = types.int64
    panel_arguments = (a, i64, i64, panel, i64, i64, panel, i64)
    out_arguments = (out, i64, i64, i64, i64, addend, i64, types.boolean)
    return types.void(rows, vectors, packed, *panel_arguments, *out_arguments), codegen


# Rows whose dot products with the same weights run side by side; at most as many as a vector has lanes.
DOT_ROWS = 4 if VECTOR_BYTES >= 32 else 2
# Lines of weights that are read side by side: the processor follows so few by itself.
DOT_COLUMNS = 4 if VECTOR_BYTES >= 32 else 1
# Lines of so many weights are asked for in the L1 cache: longer ones come from further away, and take its whole room.
SHORT = 256


def _sums_of_lanes(builder, vectors):
    """Emit one vector of the sums of the lanes of each of ``vectors``, which are as many as a vector has lanes."""
    lane_count = len(vectors)
    order = ir.VectorType(ir.IntType(32), lane_count)
    bit = 1
    # Each round halves the number of vectors: afterwards the lanes of which ``bit`` is set belong to the second of two.
    while bit < lane_count:
        numbers = range(lane_count)
        first = ir.Constant(order, [lane_count + (lane ^ bit) if lane & bit else lane for lane in numbers])
        second = ir.Constant(order, [lane_count + lane if lane & bit else lane ^ bit for lane in numbers])
        vectors = [
            builder.fadd(builder.shuffle_vector(a, b, first), builder.shuffle_vector(a, b, second))
            for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        bit *= 2
    return vectors[0]


@intrinsic(prefer_literal=True)
def _dot_products(typingctx, rows, a, a_stride, weight, depth, columns, out, out_stride, addend, add):
    """``out[r, n] = sum_k a[r, k] * weight[n, k] (+ addend[n])`` with the weights as torch keeps them.

    For ``rows`` rows, a literal, and ``columns`` columns, 1 to as many as make rows * columns the lanes of a vector.
    """
    if not isinstance(rows, types.IntegerLiteral):
        return None
    row_count, alignment = rows.literal_value, a.dtype.bitwidth // 8
    scalar = ir.FloatType() if a.dtype == types.float32 else ir.DoubleType()
    lane_count = VECTOR_BYTES // alignment
    column_count = lane_count // row_count
    vector = ir.VectorType(scalar, lane_count)
    index = ir.IntType(64)

    def codegen(context, builder, sig, args):
        _, a, a_stride, weight, depth, columns, out, out_stride, addend, add = args
        # columns that are not there repeat the last one
        last = builder.sub(columns, index(1))
        a_rows = [builder.gep(a, [builder.mul(a_stride, index(r))]) for r in range(row_count)]
        full = builder.and_(depth, index(-lane_count))
        mask = lane_mask(builder, builder.sub(depth, full), lane_count)
        has_rest = builder.icmp_signed("<", full, depth)
        group_columns = min(DOT_COLUMNS, column_count)
        zeros = [ir.Constant(vector, None)] * (row_count * group_columns)
        is_short = builder.icmp_signed("<=", depth, index(SHORT))

        def group_products(first):
            """Vectors of partial sums of a few columns, row by row: more at once are too many streams to read."""
            lines = []
            for n in range(first, first + group_columns):
                number = builder.select(builder.icmp_signed("<", last, index(n)), last, index(n))
                lines.append(builder.gep(weight, [builder.mul(depth, number)]))

            def products(load, totals):
                activations, weights = [load(row) for row in a_rows], [load(line) for line in lines]
                pairs = [(activation, weight) for activation in activations for weight in weights]
                return [fused_multiply_add(builder, *pair, total) for pair, total in zip(pairs, totals, strict=True)]

            def merged(*sources):
                """Phi nodes for the sums that come from several blocks."""
                totals = [builder.phi(vector) for _ in zeros]
                for sums, block in sources:
                    for total, source in zip(totals, sums, strict=True):
                        total.add_incoming(source, block)
                return totals

            blocks = ("choose", "short", "long", "after", "rest", "done")
            start = builder.block
            choose, short, long, after, rest, done = (builder.append_basic_block(f"dot.{name}") for name in blocks)
            builder.cbranch(builder.icmp_signed(">", full, index(0)), choose, after)
            builder.position_at_end(choose)
            builder.cbranch(is_short, short, long)

            def along_the_lines(loop, level):
                """The sums after a loop over whole vectors; it asks for the next columns in the cache of ``level``."""
                builder.position_at_end(loop)
                k = builder.phi(index)
                k.add_incoming(index(0), choose)
                sums = merged((zeros, choose))

                def whole(pointer):
                    spot = builder.bitcast(builder.gep(pointer, [k]), vector.as_pointer())
                    return builder.load(spot, align=alignment)

                # a line is too short for the processor to see where it leads
                ahead = builder.add(k, builder.mul(depth, index(group_columns)))
                for line in lines:
                    prefetch(builder, builder.gep(line, [ahead]), level)
                updated = products(whole, sums)
                following = builder.add(k, index(lane_count))
                k.add_incoming(following, loop)
                for total, update in zip(sums, updated, strict=True):
                    total.add_incoming(update, loop)
                builder.cbranch(builder.icmp_signed("<", following, full), loop, after)
                return updated, loop

            # two loops: a branch within one takes a tenth of its time
            ends = along_the_lines(short, 1), along_the_lines(long, 2)
            builder.position_at_end(after)
            totals = merged((zeros, start), *ends)
            builder.cbranch(has_rest, rest, done)
            builder.position_at_end(rest)
            completed = products(
                lambda pointer: masked_load(builder, vector, builder.gep(pointer, [full]), mask), totals
            )
            builder.branch(done)
            builder.position_at_end(done)
            return merged((totals, after), (completed, rest))

        groups = [group_products(first) for first in range(0, column_count, group_columns)]
        # row by row, column by column
        totals = [
            group[r * group_columns + n] for r in range(row_count) for group in groups for n in range(group_columns)
        ]
        result = _sums_of_lanes(builder, totals)
        there = lane_mask(builder, columns, column_count)
        # added last, and not read at all unless it is wanted: addend may point nowhere
        wanted = builder.and_(there, broadcast(builder, add, column_count))
        part = ir.VectorType(scalar, column_count)
        before = masked_load(builder, part, addend, wanted)
        for r in range(row_count):
            places = ir.Constant(
                ir.VectorType(ir.IntType(32), column_count), [r * column_count + n for n in range(column_count)]
            )
            sums = builder.shuffle_vector(result, ir.Constant(vector, ir.Undefined), places)
            target = builder.gep(out, [builder.mul(out_stride, index(r))])
            masked_store(builder, builder.fadd(sums, before), target, there)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(rows, a, i64, weight, i64, i64, out, i64, addend, types.boolean), codegen


def _make_multiply(vectors: int):
    """``multiply`` for panels of ``vectors`` vectors."""
    largest = _TILE_ROWS[vectors]
    # What the largest tiles leave over is covered by one smaller tile of each kind at most. Their calls are written out
    # because literals do not survive a tuple of arguments.
    middle = 4 if largest > 4 else 2

    @named_jit(f"{vectors}_vectors")
    def multiply(
        a,
        a_stride,
        a_step,
        rows,
        panel,
        depth,
        out,
        out_stride,
        vector_stride,
        columns,
        column_step,
        addend,
        by,
        add,
        ask_ahead,
    ):
        """``out[r, c] = sum_k a[r, k] * panel[k, c] (+ addend[r, c])`` for all rows of one panel.

        ``a[r, k]`` is at ``r * a_stride + k * a_step``; the rows of ``addend`` are ``by`` apart (0: one row for all).
        With ``ask_ahead`` the tiles share out among them to ask for what lies behind the block of weights that they
        read: the panel's next block, or the next panel. The processor itself would begin to look when it is needed.
        """
        line, share = vectors * lanes(a), lanes(a) * FETCHED_BYTES // VECTOR_BYTES
        for begin in range(0, depth, DEPTH_BLOCK):
            count = min(DEPTH_BLOCK, depth - begin)
            block = advance(panel, begin * line)
            ahead, asked, row = advance(block, count * line), 0, 0
            while row < rows:
                # else they ask for one line, which they have, over and over
                ahead_step = share if ask_ahead and asked < line else 0
                if ahead_step == 0:
                    ahead = block
                a_row = advance(a, row * a_stride + begin * a_step)
                out_row, addend_row = advance(out, row * out_stride), advance(addend, row * by)
                left = rows - row
                if left >= largest:
                    _tile(
                        largest,
                        vectors,
                        True,
                        a_row,
                        a_stride,
                        a_step,
                        block,
                        line,
                        count,
                        ahead,
                        ahead_step,
                        out_row,
                        out_stride,
                        vector_stride,
                        columns,
                        column_step,
                        addend_row,
                        by,
                        add,
                    )
                    row += largest
                elif left >= middle:
                    _tile(
                        middle,
                        vectors,
                        True,
                        a_row,
                        a_stride,
                        a_step,
                        block,
                        line,
                        count,
                        ahead,
                        ahead_step,
                        out_row,
                        out_stride,
                        vector_stride,
                        columns,
                        column_step,
                        addend_row,
                        by,
                        add,
                    )
                    row += middle
                elif left >= 2:
                    _tile(
                        2,
                        vectors,
                        True,
                        a_row,
                        a_stride,
                        a_step,
                        block,
                        line,
                        count,
                        ahead,
                        ahead_step,
                        out_row,
                        out_stride,
                        vector_stride,
                        columns,
                        column_step,
                        addend_row,
                        by,
                        add,
                    )
                    row += 2
                else:
                    _tile(
                        1,
                        vectors,
                        True,
                        a_row,
                        a_stride,
                        a_step,
                        block,
                        line,
                        count,
                        ahead,
                        ahead_step,
                        out_row,
                        out_stride,
                        vector_stride,
                        columns,
                        column_step,
                        addend_row,
                        by,
                        add,
                    )
                    row += 1
                asked += ahead_step
                ahead = advance(ahead, count * ahead_step)
            addend, by, add = out, out_stride, True

    return multiply


multiply_panel = {vectors: _make_multiply(vectors) for vectors in _TILE_ROWS}
_multiply_1, _multiply_2, _multiply_wide = multiply_panel[1], multiply_panel[2], multiply_panel[WIDE]


@jit
def neighbour_vectors(columns, vector):
    """Vectors of the next panel of neighbours, where ``columns`` are left: a wide one is not left half empty."""
    return WIDE if columns > 2 * vector else 2 if columns > vector else 1


@jit
def multiply_neighbours(a, a_stride, a_step, rows, panel, depth, out, out_stride, columns, addend, by, add, ask_ahead):
    """``multiply`` for a panel of neighbouring columns, where ``columns`` are left to the end of the matrix."""
    vector = lanes(a)
    vectors = neighbour_vectors(columns, vector)
    if vectors == WIDE:
        _multiply_wide(
            a,
            a_stride,
            a_step,
            rows,
            panel,
            depth,
            out,
            out_stride,
            vector,
            columns,
            vector,
            addend,
            by,
            add,
            ask_ahead,
        )
    elif vectors == 2:
        _multiply_2(
            a,
            a_stride,
            a_step,
            rows,
            panel,
            depth,
            out,
            out_stride,
            vector,
            columns,
            vector,
            addend,
            by,
            add,
            ask_ahead,
        )
    else:
        _multiply_1(
            a,
            a_stride,
            a_step,
            rows,
            panel,
            depth,
            out,
            out_stride,
            vector,
            columns,
            vector,
            addend,
            by,
            add,
            ask_ahead,
        )


@jit
def multiply_rows(a, a_stride, rows, weight, depth, columns, out, out_stride, addend, add):
    """``out[r, n] = sum_k a[r, k] * weight[n, k] (+ addend[n])``, weights (columns, depth) as torch keeps them.

    Right for so few rows that packing the weights costs more than it gains.
    """
    vector = lanes(a)
    row = 0
    # several rows at a time, so that each weight is loaded once for all of them
    while row + DOT_ROWS <= rows:
        a_row, out_row, step = advance(a, row * a_stride), advance(out, row * out_stride), vector // DOT_ROWS
        for column in range(0, columns, step):
            line, target = advance(weight, column * depth), advance(out_row, column)
            count = min(step, columns - column)
            _dot_products(
                DOT_ROWS, a_row, a_stride, line, depth, count, target, out_stride, advance(addend, column), add
            )
        row += DOT_ROWS
    while row < rows:
        a_row, out_row = advance(a, row * a_stride), advance(out, row * out_stride)
        for column in range(0, columns, vector):
            line, target = advance(weight, column * depth), advance(out_row, column)
            count = min(vector, columns - column)
            _dot_products(1, a_row, a_stride, line, depth, count, target, out_stride, advance(addend, column), add)
        row += 1


@jit
def multiply_lines(a, a_stride, rows, weight, line, depth, columns, out, out_stride, add):
    """``out[r, n] (+)= sum_k a[r, k] * weight[k * line + n]``, weights as torch keeps them; for few rows."""
    vector = lanes(a)
    for begin in range(0, depth, DEPTH_BLOCK):
        count = min(DEPTH_BLOCK, depth - begin)
        for column in range(0, columns, WIDE * vector):
            lines = advance(weight, begin * line + column)
            for row in range(rows):
                a_row, out_row = advance(a, row * a_stride + begin), advance(out, row * out_stride + column)
                _tile(
                    1,
                    WIDE,
                    False,
                    a_row,
                    a_stride,
                    1,
                    lines,
                    line,
                    count,
                    lines,
                    0,
                    out_row,
                    out_stride,
                    vector,
                    columns - column,
                    vector,
                    out_row,
                    out_stride,
                    add or begin > 0,
                )


@jit
def pack_rows(weight, depth, vectors, vector_stride, columns, column_step, panel):
    """A panel of the transpose of ``weight`` (columns, depth), from its first row on: ``panel[k, c] = weight[c, k]``.

    Columns beyond ``columns`` become zeros.
    """
    vector = lanes(weight)
    line = vectors * vector
    for v in range(vectors):
        rows = columns - v * column_step
        for k in range(0, depth, vector):
            source = advance(weight, v * vector_stride * depth + k)
            store_transposed(source, depth, rows, depth - k, advance(panel, k * line + v * vector), line)


# Lines that are asked for before they are read: they lie too far apart for the processor to follow them.
LINES_AHEAD = 8


@jit
def pack_lines(weight, line, depth, vectors, columns, panel, line_step, vector_step):
    """Vectors of neighbouring columns: ``panel[k * line_step + v * vector_step + lane]`` is the value at
    ``weight[k * line + v * lanes + lane]``, zero beyond ``columns``.
    """
    vector = lanes(weight)
    if columns >= vectors * vector:
        for k in range(depth):
            source, target = advance(weight, k * line), advance(panel, k * line_step)
            for v in range(vectors):
                fetch(advance(source, LINES_AHEAD * line + v * vector))
                store(target, v * vector_step, vector, load(source, v * vector, vector))
        return
    for k in range(depth):
        for v in range(vectors):
            values = load(weight, k * line + v * vector, columns - v * vector)
            store(panel, k * line_step + v * vector_step, vector, values)


@jit
def _rows_as_they_are(a, a_stride, rows, depth, pairs):
    return a, a_stride, depth


@jit
def _same(depth):
    return depth


class Operands(NamedTuple):
    """How a kernel's products take their operands: numbers of the types of values, and functions for use inside it."""

    paired: bool
    stored: object  # x and the weights, as they come
    packed: object  # panels
    # depth(k): how deep a panel of k lines of weights is
    depth: object
    # rows(a, a_stride, rows, depth, pairs): the first operand, the stride of its rows and its depth; ``pairs`` is
    # scratch for PAIR_ROWS rows of whole vectors of pairs
    rows: object
    pack_rows: object
    pack_lines: object


def operands_of(dtype: torch.dtype) -> Operands:
    """The operands of a kernel for float32, float64 or bfloat16."""
    if dtype == torch.bfloat16:
        functions = pairs_in, rows_in_pairs, pack_rows_in_pairs, pack_lines_in_pairs
        return Operands(True, types.int16(0), types.int32(0), *functions)
    zero = types.float64(0) if dtype == torch.float64 else types.float32(0)
    return Operands(False, zero, zero, _same, _rows_as_they_are, pack_rows, pack_lines)
