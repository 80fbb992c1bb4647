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
)

TILE_ROWS = 6
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
def _tile(typingctx, rows, a, a_stride, panel, depth, out, out_stride, columns, accumulate):
    """One tile: ``out[r, :columns] (+)= sum_k a[r, k] * panel[k, :]`` for r < rows (a literal)."""
    if not isinstance(rows, types.IntegerLiteral):
        return None
    row_count = rows.literal_value
    scalar = ir.FloatType() if a.dtype == types.float32 else ir.DoubleType()
    lanes = VECTOR_BYTES * 8 // a.dtype.bitwidth
    vector = ir.VectorType(scalar, lanes)
    index = ir.IntType(64)

    def codegen(context, builder, sig, args):
        _, a, a_stride, panel, depth, out, out_stride, columns, accumulate = args
        a_rows = [builder.gep(a, [builder.mul(a_stride, index(r))]) for r in range(row_count)]
        out_rows = [builder.gep(out, [builder.mul(out_stride, index(r))]) for r in range(row_count)]
        masks = [lane_mask(builder, columns, lanes, v * lanes) for v in range(TILE_VECTORS)]
        spots = [(r, v) for r in range(row_count) for v in range(TILE_VECTORS)]

        zero = ir.Constant(vector, None)
        starts = []
        for r, v in spots:
            before = masked_load(builder, vector, builder.gep(out_rows[r], [index(v * lanes)]), masks[v])
            starts.append(builder.select(accumulate, before, zero))

        before_loop = builder.block
        loop = builder.append_basic_block("tile.depth")
        after = builder.append_basic_block("tile.done")
        builder.branch(loop)
        builder.position_at_end(loop)
        k = builder.phi(index)
        sums = [builder.phi(vector) for _ in spots]
        k.add_incoming(index(0), before_loop)
        for total, start in zip(sums, starts, strict=True):
            total.add_incoming(start, before_loop)

        line = builder.gep(panel, [builder.mul(k, index(TILE_VECTORS * lanes))])
        weights = []
        for v in range(TILE_VECTORS):
            spot = builder.bitcast(builder.gep(line, [index(v * lanes)]), vector.as_pointer())
            weights.append(builder.load(spot, align=scalar_bytes(scalar)))
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
            masked_store(builder, total, builder.gep(out_rows[r], [index(v * lanes)]), masks[v])
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(rows, a, i64, panel, i64, out, i64, i64, types.boolean), codegen


def scalar_bytes(scalar):
    return 4 if isinstance(scalar, ir.FloatType) else 8


@njit(error_model="numpy")
def multiply(a, a_stride, rows, packed, depth, columns, out, out_stride, accumulate):
    """``out[r, n] (+)= sum_k a[r, k] * weight[n, k]`` for r < rows, n < columns, k < depth (at least 1).

    Strides are the elements between two rows. ``packed`` holds the weights as the module's docstring says. With
    ``accumulate`` the product is added to what stands in ``out``.
    """
    width = panel_width_of(packed)
    panel = packed
    for column in range(0, columns, width):
        left = min(width, columns - column)
        row = 0
        while row + 6 <= rows:
            a_tile, out_tile = advance(a, row * a_stride), advance(out, row * out_stride + column)
            _tile(6, a_tile, a_stride, panel, depth, out_tile, out_stride, left, accumulate)
            row += 6
        if row + 4 <= rows:
            a_tile, out_tile = advance(a, row * a_stride), advance(out, row * out_stride + column)
            _tile(4, a_tile, a_stride, panel, depth, out_tile, out_stride, left, accumulate)
            row += 4
        if row + 2 <= rows:
            a_tile, out_tile = advance(a, row * a_stride), advance(out, row * out_stride + column)
            _tile(2, a_tile, a_stride, panel, depth, out_tile, out_stride, left, accumulate)
            row += 2
        if row < rows:
            a_tile, out_tile = advance(a, row * a_stride), advance(out, row * out_stride + column)
            _tile(1, a_tile, a_stride, panel, depth, out_tile, out_stride, left, accumulate)
        panel = advance(panel, depth * width)
