"""Operands of matrix products as pairs of bfloat16, for the processor's dot product of pairs that adds up in float32.

A pair is an int32 that holds two neighbouring k, the earlier one in its lower half; where there is an odd number of
them, the last pair has a zero. Values to be paired are float32, rounded here to the nearest bfloat16, or bfloat16, as
int16, for there is no such type in LLVM's intermediate representation as llvmlite writes it.
"""

import llvmlite.binding
from llvmlite import ir
from numba.core import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from .numba_simd import VECTOR_BYTES, advance, jit, lane_mask, lanes, masked_load, masked_store, transposed

# Asked of Numba, which may have been told to compile for another processor (NUMBA_CPU_NAME): a wrong answer would end
# the process.
_, _, _features = cpu_target.target_context.codegen().magic_tuple()
HAS_PAIRS = VECTOR_BYTES == 64 and "+avx512bf16" in _features.split(",")
if HAS_PAIRS:
    llvmlite.binding.initialize_native_asmparser()  # LLVM gets these instructions as assembly, whatever its version

_LANES = VECTOR_BYTES // 4
_INDEX = ir.IntType(64)
_FLOATS = ir.VectorType(ir.FloatType(), _LANES)
_PAIRS = ir.VectorType(ir.IntType(32), _LANES)
_VALUES = ir.VectorType(ir.IntType(16), 2 * _LANES)


def _assembly(builder, instruction, constraints, result, operands):
    function_type = ir.FunctionType(result, [operand.type for operand in operands])
    return builder.call(ir.InlineAsm(function_type, instruction, constraints), operands)


def dot_of_pairs(builder, pairs, other_pairs, total):
    """Emit ``total + a0 * b0 + a1 * b1`` for every lane of float32 and its two pairs."""
    return _assembly(builder, "vdpbf16ps $3, $2, $0", "=v,0,v,v", _FLOATS, [total, pairs, other_pairs])


def _rounded(builder, low, high):
    """Emit the bfloat16 values of two vectors of float32, one after the other."""
    return _assembly(builder, "vcvtne2ps2bf16 $2, $1, $0", "=v,v,v", _VALUES, [high, low])


def _load_neighbours(builder, pointer, masks):
    """Emit the pairs of the values at ``pointer``; ``masks`` are those of their two halves."""
    if pointer.type.pointee == ir.IntType(16):
        everywhere = ir.Constant(ir.VectorType(ir.IntType(32), 2 * _LANES), list(range(2 * _LANES)))
        values = masked_load(builder, _VALUES, pointer, builder.shuffle_vector(*masks, everywhere))
    else:
        spots = pointer, builder.gep(pointer, [_INDEX(_LANES)])
        halves = [masked_load(builder, _FLOATS, spot, mask) for spot, mask in zip(spots, masks, strict=True)]
        values = _rounded(builder, *halves)
    return builder.bitcast(values, _PAIRS)


def _halves_mask(builder, count):
    return [lane_mask(builder, count, _LANES, first) for first in (0, _LANES)]


def _store_pairs(builder, pairs, target, index):
    spot = builder.gep(target, [index])
    builder.store(pairs, builder.bitcast(spot, _PAIRS.as_pointer()), align=4)


@intrinsic
def _store_neighbours(typingctx, source, count, target, index):
    """Write the pairs of ``source[:count]`` to ``target[index:]``, a whole vector with zeros behind them."""

    def codegen(context, builder, sig, args):
        source, count, target, index = args
        _store_pairs(builder, _load_neighbours(builder, source, _halves_mask(builder, count)), target, index)
        return context.get_dummy_value()

    return types.void(source, types.int64, target, types.int64), codegen


@intrinsic
def _store_interleaved(typingctx, first, second, count, second_count, target, index):
    """Write pairs of ``first[n]`` and ``second[n]`` to ``target[index:]``: a whole vector, zeros beyond the counts."""

    def codegen(context, builder, sig, args):
        first, second, count, second_count, target, index = args
        masks = [lane_mask(builder, number, _LANES) for number in (count, second_count)]
        if first.type.pointee == ir.IntType(16):
            half = ir.VectorType(ir.IntType(16), _LANES)
            low, high = (
                builder.zext(masked_load(builder, half, pointer, mask), _PAIRS)
                for pointer, mask in zip((first, second), masks, strict=True)
            )
            pairs = builder.or_(low, builder.shl(high, ir.Constant(_PAIRS, [16] * _LANES)))
        else:
            values = _rounded(
                builder, masked_load(builder, _FLOATS, first, masks[0]), masked_load(builder, _FLOATS, second, masks[1])
            )
            order = [lane // 2 + (_LANES if lane % 2 else 0) for lane in range(2 * _LANES)]
            indices = ir.Constant(ir.VectorType(ir.IntType(32), 2 * _LANES), order)
            values = builder.shuffle_vector(values, ir.Constant(_VALUES, ir.Undefined), indices)
            pairs = builder.bitcast(values, _PAIRS)
        _store_pairs(builder, pairs, target, index)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(first, second, i64, i64, target, i64), codegen


@intrinsic
def _store_transposed(typingctx, source, source_stride, rows, columns, target, target_stride):
    """``target[p * target_stride + n]`` = the pair p of row n of the source, for a square of one vector's length.

    Rows n from ``rows`` on are written as zeros; values from ``columns`` on are not read, nor pairs of them written.
    """

    def codegen(context, builder, sig, args):
        source, source_stride, rows, columns, target, target_stride = args
        masks = _halves_mask(builder, columns)
        nothing = ir.Constant(masks[0].type, None)
        lines = []
        for n in range(_LANES):
            there = builder.icmp_signed("<", _INDEX(n), rows)
            wanted = [builder.select(there, mask, nothing) for mask in masks]
            spot = builder.gep(source, [builder.mul(source_stride, _INDEX(n))])
            lines.append(builder.bitcast(_load_neighbours(builder, spot, wanted), _FLOATS))
        everything = ir.Constant(nothing.type, [1] * _LANES)
        for p, line in enumerate(transposed(builder, lines)):
            wanted = builder.select(builder.icmp_signed("<", _INDEX(2 * p), columns), everything, nothing)
            masked_store(builder, line, builder.gep(target, [builder.mul(target_stride, _INDEX(p))]), wanted)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(source, i64, i64, i64, target, i64), codegen


@jit
def pairs_in(depth):
    """How many pairs hold ``depth`` values."""
    return (depth + 1) // 2


# Rows that are turned into pairs at a time: few enough to stay in the L2 cache, many for every panel that is read.
PAIR_ROWS = 96


@jit
def rows_in_pairs(a, a_stride, rows, depth, pairs):
    """Rows of values as rows of pairs: where they stand, their stride and how deep they are."""
    vector = lanes(pairs)
    stride = (pairs_in(depth) + vector - 1) // vector * vector
    for row in range(rows):
        for k in range(0, depth, 2 * vector):
            _store_neighbours(advance(a, row * a_stride + k), depth - k, pairs, row * stride + k // 2)
    return pairs, stride, pairs_in(depth)


@jit
def pack_rows_in_pairs(weight, depth, vectors, vector_stride, columns, column_step, panel):
    """``pack_rows`` of ``numba_tile.py`` for a panel of pairs."""
    vector = lanes(panel)
    line = vectors * vector
    for v in range(vectors):
        rows = columns - v * column_step
        for k in range(0, depth, 2 * vector):
            source = advance(weight, v * vector_stride * depth + k)
            _store_transposed(source, depth, rows, depth - k, advance(panel, k // 2 * line + v * vector), line)


@jit
def pack_lines_in_pairs(weight, line, depth, vectors, columns, panel, line_step, vector_step):
    """``pack_lines`` of ``numba_tile.py`` for a panel of pairs."""
    vector = lanes(panel)
    for k in range(0, depth, 2):
        for v in range(vectors):
            first, count = advance(weight, k * line + v * vector), columns - v * vector
            second_count = count if k + 1 < depth else 0
            place = k // 2 * line_step + v * vector_step
            _store_interleaved(first, advance(first, line), count, second_count, panel, place)
