"""The matrix product behind every kernel: rows times packed weights, in register tiles of LLVM vector code.

``multiply`` computes ``out[r, n] = sum_k a[r, k] * weight[n, k]``. The weights are packed into panels of
``panel_width`` output columns, ``packed[panel][k][column]``, so that the inner loop reads them in order. A tile
of up to 6 rows x one panel stays in registers over the whole of k.
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
    masked_load,
    masked_store,
    sum_of_lanes,
)

TILE_VECTORS = 4 if MANY_REGISTERS else 2


def panel_width(itemsize: int) -> int:
    """Output columns of one panel for values of ``itemsize`` bytes."""
    return TILE_VECTORS * VECTOR_BYTES // itemsize


@intrinsic
def panel_width_of(typingctx, pointer):
    """``panel_width`` for the values that ``pointer`` points to, inside a kernel."""
    width = panel_width(pointer.dtype.bitwidth // 8)

    def codegen(context, builder, sig, args):
        return ir.Constant(ir.IntType(64), width)

    return types.int64(pointer), codegen


@intrinsic(prefer_literal=True)
def _tile(typingctx, rows, packed, a, a_stride, panel, line_size, depth, out, out_stride, columns, accumulate):
    """One tile: ``out[r, :columns] (+)= sum_k a[r, k] * panel[k * line_size, :columns]`` for r < rows.

    ``rows`` and ``packed`` are literals. Packed panels may be read beyond ``columns``, others may not.
    """
    if not isinstance(rows, types.IntegerLiteral) or not isinstance(packed, types.BooleanLiteral):
        return None
    row_count, a_type = rows.literal_value, a.dtype
    scalar = ir.FloatType() if a.dtype == types.float32 else ir.DoubleType()
    lanes = VECTOR_BYTES * 8 // a.dtype.bitwidth
    vector = ir.VectorType(scalar, lanes)
    index = ir.IntType(64)

    def codegen(context, builder, sig, args):
        _, _, a, a_stride, panel, line_size, depth, out, out_stride, columns, accumulate = args
        a_rows = [builder.gep(a, [builder.mul(a_stride, index(r))]) for r in range(row_count)]
        out_rows = [builder.gep(out, [builder.mul(out_stride, index(r))]) for r in range(row_count)]
        masks = [lane_mask(builder, columns, lanes, v * lanes) for v in range(TILE_VECTORS)]
        spots = [(r, v) for r in range(row_count) for v in range(TILE_VECTORS)]

        zero = ir.Constant(vector, None)
        before_loop = builder.block
        loop = builder.append_basic_block("tile.depth")
        after = builder.append_basic_block("tile.done")
        builder.branch(loop)
        builder.position_at_end(loop)
        k = builder.phi(index)
        sums = [builder.phi(vector) for _ in spots]
        k.add_incoming(index(0), before_loop)
        for total in sums:
            total.add_incoming(zero, before_loop)

        line = builder.gep(panel, [builder.mul(k, line_size)])
        weights = []
        for v in range(TILE_VECTORS):
            spot = builder.gep(line, [index(v * lanes)])
            if packed.literal_value:
                weights.append(builder.load(builder.bitcast(spot, vector.as_pointer()), align=a_type.bitwidth // 8))
            else:
                weights.append(masked_load(builder, vector, spot, masks[v]))
        activations = [broadcast(builder, builder.load(builder.gep(row, [k])), lanes) for row in a_rows]
        updated = [
            fused_multiply_add(builder, activations[r], weights[v], total)
            for (r, v), total in zip(spots, sums, strict=True)
        ]
        following = builder.add(k, index(1))
        k.add_incoming(following, loop)
        for total, update in zip(sums, updated, strict=True):
            total.add_incoming(update, loop)
        builder.cbranch(builder.icmp_signed("<", following, depth), loop, after)

        builder.position_at_end(after)
        for (r, v), total in zip(spots, updated, strict=True):
            target = builder.gep(out_rows[r], [index(v * lanes)])
            # added last: a sum that starts from a large value loses the digits of the small ones
            before = builder.select(accumulate, masked_load(builder, vector, target, masks[v]), zero)
            masked_store(builder, builder.fadd(total, before), target, masks[v])
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(rows, packed, a, i64, panel, i64, i64, out, i64, i64, types.boolean), codegen


@intrinsic(prefer_literal=True)
def _dot_products(typingctx, columns, a, weight, depth, out):
    """``out[n] = sum_k a[k] * weight[n, k]`` for n < columns (a literal), with the weights as torch keeps them."""
    if not isinstance(columns, types.IntegerLiteral):
        return None
    column_count = columns.literal_value
    scalar = ir.FloatType() if a.dtype == types.float32 else ir.DoubleType()
    lanes = VECTOR_BYTES * 8 // a.dtype.bitwidth
    vector = ir.VectorType(scalar, lanes)
    index = ir.IntType(64)

    def codegen(context, builder, sig, args):
        _, a, weight, depth, out = args
        lines = [builder.gep(weight, [builder.mul(depth, index(n))]) for n in range(column_count)]
        before_loop = builder.block
        loop = builder.append_basic_block("dot.depth")
        after = builder.append_basic_block("dot.done")
        builder.branch(loop)
        builder.position_at_end(loop)
        k = builder.phi(index)
        k.add_incoming(index(0), before_loop)
        sums = [builder.phi(vector) for _ in lines]
        mask = lane_mask(builder, builder.sub(depth, k), lanes)
        activations = masked_load(builder, vector, builder.gep(a, [k]), mask)
        following = builder.add(k, index(lanes))
        updated = []
        for total, line in zip(sums, lines, strict=True):
            weights = masked_load(builder, vector, builder.gep(line, [k]), mask)
            updated.append(fused_multiply_add(builder, activations, weights, total))
            total.add_incoming(ir.Constant(vector, None), before_loop)
            total.add_incoming(updated[-1], loop)
        k.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, depth), loop, after)
        builder.position_at_end(after)
        for n, total in enumerate(updated):
            builder.store(sum_of_lanes(builder, total), builder.gep(out, [index(n)]))
        return context.get_dummy_value()

    return types.void(columns, a, weight, types.int64, out), codegen


@njit(error_model="numpy")
def _multiply_panels(a, a_stride, rows, panel, depth, columns, out, out_stride, accumulate):
    width = panel_width_of(panel)
    for column in range(0, columns, width):
        left = min(width, columns - column)
        row = 0
        while row + 6 <= rows:
            a_tile, out_tile = advance(a, row * a_stride), advance(out, row * out_stride + column)
            _tile(6, True, a_tile, a_stride, panel, width, depth, out_tile, out_stride, left, accumulate)
            row += 6
        if row + 4 <= rows:
            a_tile, out_tile = advance(a, row * a_stride), advance(out, row * out_stride + column)
            _tile(4, True, a_tile, a_stride, panel, width, depth, out_tile, out_stride, left, accumulate)
            row += 4
        if row + 2 <= rows:
            a_tile, out_tile = advance(a, row * a_stride), advance(out, row * out_stride + column)
            _tile(2, True, a_tile, a_stride, panel, width, depth, out_tile, out_stride, left, accumulate)
            row += 2
        if row < rows:
            a_tile, out_tile = advance(a, row * a_stride), advance(out, row * out_stride + column)
            _tile(1, True, a_tile, a_stride, panel, width, depth, out_tile, out_stride, left, accumulate)
        panel = advance(panel, depth * width)


@njit(error_model="numpy")
def multiply(packed, a, a_stride, rows, weight, depth, columns, out, out_stride):
    """``out[r, n] = sum_k a[r, k] * weight[n, k]`` for r < rows, n < columns, k < depth (at least 1).

    Strides are the elements between two rows. ``weight`` is in panels if ``packed``, else as torch keeps it,
    (columns, depth): right for so few rows that packing costs more than it gains.
    """
    if packed:
        _multiply_panels(a, a_stride, rows, weight, depth, columns, out, out_stride, False)
        return
    for row in range(rows):
        a_row, out_row = advance(a, row * a_stride), advance(out, row * out_stride)
        column = 0
        while column + 8 <= columns:
            _dot_products(8, a_row, advance(weight, column * depth), depth, advance(out_row, column))
            column += 8
        while column < columns:
            _dot_products(1, a_row, advance(weight, column * depth), depth, advance(out_row, column))
            column += 1


@njit(error_model="numpy")
def multiply_transposed(packed, a, a_stride, rows, weight, depth, columns, out, out_stride, accumulate):
    """``out[r, n] (+)= sum_k a[r, k] * weight[k, n]``, the arguments as in ``multiply``.

    ``weight`` is in panels, packed from its transpose, or (depth, columns). With ``accumulate`` the product is added
    to what stands in ``out``.
    """
    if packed:
        _multiply_panels(a, a_stride, rows, weight, depth, columns, out, out_stride, accumulate)
        return
    width = panel_width_of(weight)
    for row in range(rows):
        a_row, out_row = advance(a, row * a_stride), advance(out, row * out_stride)
        for column in range(0, columns, width):
            left = min(width, columns - column)
            line, target = advance(weight, column), advance(out_row, column)
            _tile(1, False, a_row, a_stride, line, columns, depth, target, out_stride, left, accumulate)
