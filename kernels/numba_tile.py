"""The matrix product behind every kernel: register tiles of LLVM vector code, and the packing of weights for them.

A tile of up to 8 rows x 4 vectors of columns stays in registers over the whole depth of the product. The weights are
packed into panels of as many columns, ``panel[k * line + column]``, so that the inner loop reads them in order. The
vectors of a panel are either neighbours (``vector_stride`` = ``column_step`` = the lanes of a vector) or hold the
gates of the same hidden units (``vector_stride`` = the hidden size, ``column_step`` = 0), which one thread then owns
as a whole.

Strides count elements. Every sum runs over k in the same order whatever the tile, so that results do not depend on how
rows and columns are shared out.
"""

from llvmlite import ir
from numba import njit
from numba.core import types
from numba.extending import intrinsic

from .numba_simd import (
    MANY_REGISTERS,
    VECTOR_BYTES,
    advance,
    broadcast,
    fused_multiply_add,
    lane_mask,
    lanes,
    load,
    masked_load,
    masked_store,
    store,
    store_transposed,
    sum_of_lanes,
)
from .numba_team import named_jit

jit = njit(error_model="numpy")

# Rows of the largest tile for a number of vectors: accumulators, one line of weights and a broadcast value fit into 32
# or 16 registers, and there are enough accumulators to hide the latency of a multiply-add.
_TILE_ROWS = {1: 8, 2: 8, 3: 8, 4: 6} if MANY_REGISTERS else {1: 8, 2: 6, 3: 4, 4: 2}
# Columns of a panel of neighbours, in vectors.
WIDE = 4 if MANY_REGISTERS else 2
# Longer sums are made of parts of this length: a panel of one part stays in the L2 cache.
DEPTH_BLOCK = 1024
# Columns whose dot products with one row run side by side.
DOTS = 8


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
    ``columns``, others may not.
    """
    literals = isinstance(rows, types.IntegerLiteral) and isinstance(vectors, types.IntegerLiteral)
    if not literals or not isinstance(packed, types.BooleanLiteral):
        return None
    row_count, vector_count, a_type = rows.literal_value, vectors.literal_value, a.dtype
    scalar = ir.FloatType() if a.dtype == types.float32 else ir.DoubleType()
    lane_count = VECTOR_BYTES * 8 // a.dtype.bitwidth
    vector = ir.VectorType(scalar, lane_count)
    index = ir.IntType(64)

    def codegen(context, builder, sig, args):
        a, a_stride, a_step, panel, line_size, depth, out, out_stride, vector_stride = args[3:12]
        columns, column_step, addend, addend_stride, add = args[12:]
        a_rows = [builder.gep(a, [builder.mul(a_stride, index(r))]) for r in range(row_count)]
        counts = [builder.sub(columns, builder.mul(column_step, index(v))) for v in range(vector_count)]
        masks = [lane_mask(builder, count, lane_count) for count in counts]
        spots = [(r, v) for r in range(row_count) for v in range(vector_count)]

        zero = ir.Constant(vector, None)
        before_loop = builder.block
        loop = builder.append_basic_block("tile.depth")
        after = builder.append_basic_block("tile.done")
        builder.branch(loop)
        builder.position_at_end(loop)
        k, a_offset, line_offset = builder.phi(index), builder.phi(index), builder.phi(index)
        sums = [builder.phi(vector) for _ in spots]
        for counter in (k, a_offset, line_offset):
            counter.add_incoming(index(0), before_loop)
        for total in sums:
            total.add_incoming(zero, before_loop)

        line = builder.gep(panel, [line_offset])
        weights = []
        for v in range(vector_count):
            spot = builder.gep(line, [index(v * lane_count)])
            if packed.literal_value:
                weights.append(builder.load(builder.bitcast(spot, vector.as_pointer()), align=a_type.bitwidth // 8))
            else:
                weights.append(masked_load(builder, vector, spot, masks[v]))
        activations = [broadcast(builder, builder.load(builder.gep(row, [a_offset])), lane_count) for row in a_rows]
        updated = [
            fused_multiply_add(builder, activations[r], weights[v], total)
            for (r, v), total in zip(spots, sums, strict=True)
        ]
        following = builder.add(k, index(1))
        k.add_incoming(following, loop)
        a_offset.add_incoming(builder.add(a_offset, a_step), loop)
        line_offset.add_incoming(builder.add(line_offset, line_size), loop)
        for total, update in zip(sums, updated, strict=True):
            total.add_incoming(update, loop)
        builder.cbranch(builder.icmp_signed("<", following, depth), loop, after)

        builder.position_at_end(after)
        addend_masks = [builder.and_(mask, broadcast(builder, add, lane_count)) for mask in masks]
        for (r, v), total in zip(spots, updated, strict=True):
            column = builder.mul(vector_stride, index(v))
            target = builder.gep(out, [builder.add(builder.mul(out_stride, index(r)), column)])
            source = builder.gep(addend, [builder.add(builder.mul(addend_stride, index(r)), column)])
            # added last: a sum that starts from a large value loses the digits of the small ones
            total = builder.fadd(total, masked_load(builder, vector, source, addend_masks[v]))
            masked_store(builder, total, target, masks[v])
        return context.get_dummy_value()

    i64 = types.int64
    panel_arguments = (a, i64, i64, panel, i64, i64)
    out_arguments = (out, i64, i64, i64, i64, addend, i64, types.boolean)
    return types.void(rows, vectors, packed, *panel_arguments, *out_arguments), codegen


@intrinsic(prefer_literal=True)
def _dot_products(typingctx, columns, a, weight, depth, out, addend, add):
    """``out[n] = sum_k a[k] * weight[n, k] (+ addend[n])`` for n < columns (a literal), weights as torch keeps them."""
    if not isinstance(columns, types.IntegerLiteral):
        return None
    column_count, alignment = columns.literal_value, a.dtype.bitwidth // 8
    scalar = ir.FloatType() if a.dtype == types.float32 else ir.DoubleType()
    lane_count = VECTOR_BYTES // alignment
    vector = ir.VectorType(scalar, lane_count)
    index = ir.IntType(64)

    def codegen(context, builder, sig, args):
        _, a, weight, depth, out, addend, add = args
        lines = [builder.gep(weight, [builder.mul(depth, index(n))]) for n in range(column_count)]
        full = builder.and_(depth, index(-lane_count))
        zero = ir.Constant(vector, None)
        before_loop = builder.block
        loop = builder.append_basic_block("dot.depth")
        after = builder.append_basic_block("dot.rest")
        builder.cbranch(builder.icmp_signed(">", full, index(0)), loop, after)
        builder.position_at_end(loop)
        k = builder.phi(index)
        k.add_incoming(index(0), before_loop)

        def whole_vector(pointer):
            return builder.load(builder.bitcast(builder.gep(pointer, [k]), vector.as_pointer()), align=alignment)

        sums = [builder.phi(vector) for _ in lines]
        activations = whole_vector(a)
        updated = [
            fused_multiply_add(builder, activations, whole_vector(line), total)
            for line, total in zip(lines, sums, strict=True)
        ]
        following = builder.add(k, index(lane_count))
        k.add_incoming(following, loop)
        for total, update in zip(sums, updated, strict=True):
            total.add_incoming(zero, before_loop)
            total.add_incoming(update, loop)
        builder.cbranch(builder.icmp_signed("<", following, full), loop, after)

        builder.position_at_end(after)
        totals = [builder.phi(vector) for _ in lines]
        for total, update in zip(totals, updated, strict=True):
            total.add_incoming(zero, before_loop)
            total.add_incoming(update, loop)
        mask = lane_mask(builder, builder.sub(depth, full), lane_count)
        activations = masked_load(builder, vector, builder.gep(a, [full]), mask)
        for n, line in enumerate(lines):
            weights = masked_load(builder, vector, builder.gep(line, [full]), mask)
            totals[n] = fused_multiply_add(builder, activations, weights, totals[n])
        results = [sum_of_lanes(builder, total) for total in totals]
        # added last, and not read at all unless it is wanted: addend may point nowhere
        with builder.if_else(add) as (adding, storing):
            with adding:
                for n, result in enumerate(results):
                    before = builder.load(builder.gep(addend, [index(n)]))
                    builder.store(builder.fadd(result, before), builder.gep(out, [index(n)]))
            with storing:
                for n, result in enumerate(results):
                    builder.store(result, builder.gep(out, [index(n)]))
        return context.get_dummy_value()

    return types.void(columns, a, weight, types.int64, out, addend, types.boolean), codegen


def _make_multiply(vectors: int):
    """``multiply`` for panels of ``vectors`` vectors."""
    largest = _TILE_ROWS[vectors]
    # what the largest tiles leave over is covered by one smaller tile of each kind at most
    middle = 4 if largest > 4 else 2

    @named_jit(f"{vectors}_vectors")
    def multiply(
        a, a_stride, a_step, rows, panel, depth, out, out_stride, vector_stride, columns, column_step, addend, by, add
    ):
        """``out[r, c] = sum_k a[r, k] * panel[k, c] (+ addend[r, c])`` for all rows of one panel.

        ``a[r, k]`` is at ``r * a_stride + k * a_step``; the rows of ``addend`` are ``by`` apart (0: one row for all).
        """
        line = vectors * lanes(a)
        for begin in range(0, depth, DEPTH_BLOCK):
            count = min(DEPTH_BLOCK, depth - begin)
            block = advance(panel, begin * line)
            row = 0
            while row < rows:
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
            addend, by, add = out, out_stride, True

    return multiply


multiply_panel = {vectors: _make_multiply(vectors) for vectors in _TILE_ROWS}


@jit
def multiply_rows(a, a_stride, rows, weight, depth, columns, out, out_stride, addend, add):
    """``out[r, n] = sum_k a[r, k] * weight[n, k] (+ addend[n])`` with the weights as torch keeps them, (columns, depth).

    Right for so few rows that packing the weights costs more than it gains.
    """
    column = 0
    while column + DOTS <= columns:
        for row in range(rows):
            a_row, out_row = advance(a, row * a_stride), advance(out, row * out_stride + column)
            _dot_products(DOTS, a_row, advance(weight, column * depth), depth, out_row, advance(addend, column), add)
        column += DOTS
    while column < columns:
        for row in range(rows):
            a_row, out_row = advance(a, row * a_stride), advance(out, row * out_stride + column)
            _dot_products(1, a_row, advance(weight, column * depth), depth, out_row, advance(addend, column), add)
        column += 1


@jit
def multiply_lines(a, a_stride, rows, weight, line, depth, columns, out, out_stride, add):
    """``out[r, n] (+)= sum_k a[r, k] * weight[k * line + n]``, weights as torch keeps them; for few rows."""
    vector = lanes(a)
    for column in range(0, columns, WIDE * vector):
        for row in range(rows):
            a_row, out_row = advance(a, row * a_stride), advance(out, row * out_stride + column)
            _tile(
                1,
                WIDE,
                False,
                a_row,
                a_stride,
                1,
                advance(weight, column),
                line,
                depth,
                out_row,
                out_stride,
                vector,
                columns - column,
                vector,
                out_row,
                out_stride,
                add,
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


@jit
def pack_lines(weight, line, depth, vectors, columns, panel):
    """A panel of neighbouring columns of ``weight``: ``panel[k, c] = weight[k * line + c]``, zeros beyond ``columns``."""
    vector = lanes(weight)
    for k in range(depth):
        for v in range(vectors):
            values = load(weight, k * line + v * vector, columns - v * vector)
            store(panel, (k * vectors + v) * vector, vector, values)
