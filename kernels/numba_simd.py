"""A SIMD vector type for Numba: arithmetic, masked memory access and the few bit tricks that the cell maths needs.

Kernels are written with whole vectors instead of scalar loops because LLVM's loop vectoriser gives up on the cells:
they touch a dozen arrays, more than it is willing to check for overlap. A ``Vector`` is as wide as the registers of the
host; the last, partial vector of a row is handled by the ``count`` of ``load`` and ``store``.
"""

import operator

import llvmlite.binding
from llvmlite import ir
from numba import njit
from numba.core import cgutils, types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, lower_cast, models, register_model

from .numba_library import KernelCompiler


def _host_vector_bytes() -> int:
    features = llvmlite.binding.get_host_cpu_features()
    if features.get("avx512f"):
        return 64
    return 32 if features.get("avx2") and features.get("fma") else 16


VECTOR_BYTES = _host_vector_bytes()
# 32 vector registers (AVX-512, NEON) hold a tile of 6 x 4 accumulators, 16 registers one of 6 x 2.
MANY_REGISTERS = VECTOR_BYTES == 64 or llvmlite.binding.get_default_triple().startswith(("aarch64", "arm64"))


class Vector(types.Type):
    """One register of ``dtype`` (float32 or float64) values."""

    def __init__(self, dtype: types.Float):
        self.dtype = dtype
        self.lanes = VECTOR_BYTES * 8 // dtype.bitwidth
        super().__init__(name=f"Vector({dtype} x {self.lanes})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        super().__init__(manager, vector, _llvm_type(vector))


def _llvm_scalar(vector):
    return ir.FloatType() if vector.dtype == types.float32 else ir.DoubleType()


def _llvm_type(vector):
    return ir.VectorType(_llvm_scalar(vector), vector.lanes)


def _constant(vector, value):
    return ir.Constant(_llvm_type(vector), [float(value)] * vector.lanes)


def broadcast(builder, scalar, lanes):
    """Emit a vector whose ``lanes`` lanes all hold ``scalar``."""
    vector = ir.VectorType(scalar.type, lanes)
    indices = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, undefined, indices)


def lane_mask(builder, count, lanes, first_lane=0):
    """Emit ``first_lane + lane < count`` for every lane; a constant count folds to a constant mask."""
    index = ir.IntType(64)
    numbers = ir.Constant(ir.VectorType(index, lanes), [first_lane + lane for lane in range(lanes)])
    return builder.icmp_signed("<", numbers, broadcast(builder, count, lanes))


def _suffix(vector_type):
    element = vector_type.element
    name = f"i{element.width}" if isinstance(element, ir.IntType) else f"f{8 * _scalar_bytes(vector_type)}"
    return f"v{vector_type.count}{name}"


def masked_load(builder, vector_type, pointer, mask):
    """Emit a load of the lanes that ``mask`` selects; the others read as zero and touch no memory."""
    pointer = builder.bitcast(pointer, vector_type.as_pointer())
    alignment = ir.IntType(32)
    function_type = ir.FunctionType(vector_type, [pointer.type, alignment, mask.type, vector_type])
    name = f"llvm.masked.load.{_suffix(vector_type)}.p0"
    function = cgutils.get_or_insert_function(builder.module, function_type, name)
    zero = ir.Constant(vector_type, None)
    return builder.call(function, [pointer, alignment(_scalar_bytes(vector_type)), mask, zero])


def masked_store(builder, value, pointer, mask):
    """Emit a store of the lanes that ``mask`` selects."""
    pointer = builder.bitcast(pointer, value.type.as_pointer())
    alignment = ir.IntType(32)
    function_type = ir.FunctionType(ir.VoidType(), [value.type, pointer.type, alignment, mask.type])
    name = f"llvm.masked.store.{_suffix(value.type)}.p0"
    function = cgutils.get_or_insert_function(builder.module, function_type, name)
    builder.call(function, [value, pointer, alignment(_scalar_bytes(value.type)), mask])


def fused_multiply_add(builder, a, b, c):
    """Emit ``a * b + c`` with one rounding."""
    function_type = ir.FunctionType(a.type, [a.type] * 3)
    function = cgutils.get_or_insert_function(builder.module, function_type, f"llvm.fma.{_suffix(a.type)}")
    return builder.call(function, [a, b, c])


def prefetch(builder, pointer, level=2):
    """Emit a request to bring the cache line at ``pointer`` into a cache; a wrong address does no harm."""
    pointer = builder.bitcast(pointer, ir.IntType(8).as_pointer())
    number = ir.IntType(32)
    function_type = ir.FunctionType(ir.VoidType(), [pointer.type, number, number, number])
    function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")
    builder.call(function, [pointer, number(0), number(4 - level), number(1)])  # to read, how near, data


def _scalar_bytes(vector_type):
    if isinstance(vector_type.element, ir.IntType):
        return vector_type.element.width // 8
    return 4 if isinstance(vector_type.element, ir.FloatType) else 8


def transposed(builder, lines):
    """Emit the vectors of the columns of as many ``lines`` as a vector has lanes."""
    lines, lane_count = list(lines), len(lines)
    order = ir.VectorType(ir.IntType(32), lane_count)
    # each round swaps one bit of the row number with the same bit of the lane number
    bit = 1
    while bit < lane_count:
        numbers = range(lane_count)
        upper = [lane_count + (lane ^ bit) if lane & bit else lane for lane in numbers]
        lower = [lane_count + lane if lane & bit else lane ^ bit for lane in numbers]
        for n in numbers:
            if not n & bit:
                pair = lines[n], lines[n | bit]
                lines[n], lines[n | bit] = (
                    builder.shuffle_vector(*pair, ir.Constant(order, places)) for places in (upper, lower)
                )
        bit *= 2
    return lines


# How every function of the kernels is compiled: no wrappers, for none is called from Python. ``inline`` is for what is
# small and stands in inner loops.
_OPTIONS = dict(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True, pipeline_class=KernelCompiler)
jit = njit(**_OPTIONS)
inline = njit(**_OPTIONS, forceinline=True)


def named_jit(tag: str):
    """``jit`` for functions made by a factory: ``tag`` tells those of one call of the factory from another's.

    A function's symbol has its name and a number that counts up in every process. Kernels compiled by different
    processes meet in one when they are loaded from disk: without the tag, two of the same symbol, and one would run in
    place of the other.
    """

    def compile_lazily(function):
        function.__qualname__ = f"{function.__qualname__}.{tag}"
        return jit(function)

    return compile_lazily


# Operators. A Python or Numba number on either side is broadcast.


class _VectorArithmetic(AbstractTemplate):
    def generic(self, args, kws):
        vectors = [arg for arg in args if isinstance(arg, Vector)]
        if vectors and all(isinstance(arg, Vector | types.Number) for arg in args):
            return signature(vectors[0], *[vectors[0]] * len(args))
        return None


def _register_operator(key, instruction):
    infer_global(key)(type(f"_Vector_{key.__name__}", (_VectorArithmetic,), {"key": key}))

    @lower_builtin(key, Vector, Vector)
    def lower(context, builder, sig, args):
        # "contract" lets a multiplication and an addition become one fused instruction.
        return getattr(builder, instruction)(*args, flags=("contract",))


for _key, _instruction in {
    operator.add: "fadd",
    operator.sub: "fsub",
    operator.mul: "fmul",
    operator.truediv: "fdiv",
}.items():
    _register_operator(_key, _instruction)

infer_global(operator.neg)(type("_Vector_neg", (_VectorArithmetic,), {"key": operator.neg}))


@lower_builtin(operator.neg, Vector)
def _lower_negation(context, builder, sig, args):
    return builder.fneg(args[0])


@lower_cast(types.Float, Vector)
@lower_cast(types.Integer, Vector)
def _number_to_vector(context, builder, fromty, toty, value):
    return broadcast(builder, context.cast(builder, value, fromty, toty.dtype), toty.lanes)


# Memory. Pointers are typed (CPointer(float32) or CPointer(float64)) and counted in elements.


@intrinsic
def as_pointer(typingctx, address, witness):
    """The integer ``address`` as a pointer to values of the type of ``witness``."""
    pointer = types.CPointer(witness)

    def codegen(context, builder, sig, args):
        return builder.inttoptr(args[0], context.get_value_type(pointer))

    return pointer(types.int64, witness), codegen


@intrinsic
def advance(typingctx, pointer, elements):
    """``pointer + elements``."""

    def codegen(context, builder, sig, args):
        return builder.gep(args[0], [args[1]])

    return pointer(pointer, types.int64), codegen


@intrinsic
def load(typingctx, pointer, index, count):
    """The vector at ``pointer[index:]``; lanes from ``count`` on are zero and not read."""
    vector = Vector(pointer.dtype)

    def codegen(context, builder, sig, args):
        mask = lane_mask(builder, args[2], vector.lanes)
        return masked_load(builder, _llvm_type(vector), builder.gep(args[0], [args[1]]), mask)

    return vector(pointer, types.int64, types.int64), codegen


@intrinsic
def store(typingctx, pointer, index, count, vector):
    """Write the first ``count`` lanes of ``vector`` to ``pointer[index:]``."""

    def codegen(context, builder, sig, args):
        mask = lane_mask(builder, args[2], vector.lanes)
        masked_store(builder, args[3], builder.gep(args[0], [args[1]]), mask)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, types.int64, vector), codegen


@intrinsic
def fetch(typingctx, pointer):
    """Ask for the cache line at ``pointer``, which will be read soon; a wrong address does no harm."""

    def codegen(context, builder, sig, args):
        prefetch(builder, args[0])
        return context.get_dummy_value()

    return types.void(pointer), codegen


@intrinsic
def lanes(typingctx, pointer):
    """How many values of the pointer's type one vector holds."""
    count = Vector(pointer.dtype).lanes

    def codegen(context, builder, sig, args):
        return ir.Constant(ir.IntType(64), count)

    return types.int64(pointer), codegen


@intrinsic
def store_transposed(typingctx, source, source_stride, rows, columns, target, target_stride):
    """``target[k * target_stride + n] = source[n * source_stride + k]`` for a square of one vector's length.

    Rows n from ``rows`` on are written as zeros; columns k from ``columns`` on are neither read nor written.
    """
    vector = Vector(source.dtype)
    llvm, lanes = _llvm_type(vector), vector.lanes
    index = ir.IntType(64)

    def codegen(context, builder, sig, args):
        source, source_stride, rows, columns, target, target_stride = args
        mask = lane_mask(builder, columns, lanes)
        nothing, everything = ir.Constant(mask.type, None), ir.Constant(mask.type, [1] * lanes)
        lines = []
        for n in range(lanes):
            wanted = builder.select(builder.icmp_signed("<", index(n), rows), mask, nothing)
            spot = builder.gep(source, [builder.mul(source_stride, index(n))])
            lines.append(masked_load(builder, llvm, spot, wanted))
            # so many rows side by side are more streams than the processor follows by itself
            prefetch(builder, builder.gep(spot, [index(4 * lanes)]))
        for k, line in enumerate(transposed(builder, lines)):
            wanted = builder.select(builder.icmp_signed("<", index(k), columns), everything, nothing)
            masked_store(builder, line, builder.gep(target, [builder.mul(target_stride, index(k))]), wanted)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(source, i64, i64, i64, target, i64), codegen


@intrinsic
def sum_of(typingctx, vector):
    """The sum of a vector's lanes, halves added to each other until one value is left."""

    def codegen(context, builder, sig, args):
        total, order = args[0], ir.VectorType(ir.IntType(32), vector.lanes)
        undefined = ir.Constant(_llvm_type(vector), ir.Undefined)
        half = vector.lanes // 2
        while half:
            places = [lane + half if lane < half else lane for lane in range(vector.lanes)]
            total = builder.fadd(total, builder.shuffle_vector(total, undefined, ir.Constant(order, places)))
            half //= 2
        return builder.extract_element(total, ir.Constant(ir.IntType(32), 0))

    return vector.dtype(vector), codegen


@intrinsic
def checksum(typingctx, pointer, count, start):
    """64 bits that tell ``count`` values from others; ``start``: those of what stood before them, or any number.

    Lanes of 64 bits, each ``h = rotate((h xor value) * odd)``, whose multiplication spreads a change upward and whose
    rotation brings it back down; then the lanes one after another in the same way. One changed lane always changes the
    result, and any other change does but for one case in 2**64 or so. It is not made against who wants to deceive.
    """
    lane_count, index = VECTOR_BYTES // 8, ir.IntType(64)
    words = ir.VectorType(ir.IntType(64), lane_count)
    factor, turn, sums = 0x9FB21C651E98DF25, 29, 4

    def mixed(builder, total, value):
        def constant(number):
            return ir.Constant(total.type, [number] * lane_count if total.type == words else number)

        product = builder.mul(builder.xor(total, value), constant(factor))
        return builder.or_(builder.shl(product, constant(turn)), builder.lshr(product, constant(64 - turn)))

    def codegen(context, builder, sig, args):
        pointer, count, start = args
        scalar = pointer.type.pointee
        values = VECTOR_BYTES // _scalar_bytes(ir.VectorType(scalar, 1))
        llvm = ir.VectorType(scalar, values)
        seeds = [[factor * (n * lane_count + k + 1) % 2**64 for k in range(lane_count)] for n in range(sums)]
        totals = [cgutils.alloca_once_value(builder, ir.Constant(words, seed)) for seed in seeds]

        def mix(total, k, mask=None):
            spot = builder.gep(pointer, [k])
            if mask is None:
                value = builder.load(builder.bitcast(spot, llvm.as_pointer()), align=_scalar_bytes(llvm))
            else:
                value = masked_load(builder, llvm, spot, mask)
            builder.store(mixed(builder, builder.load(total), builder.bitcast(value, words)), total)

        step = index(sums * values)
        whole = builder.mul(builder.sdiv(count, step), step)
        with cgutils.for_range_slice(builder, index(0), whole, step, intp=index) as (k, _):
            for n, total in enumerate(totals):
                mix(total, builder.add(k, index(n * values)))
        with cgutils.for_range_slice(builder, whole, count, index(values), intp=index) as (k, _):
            mix(totals[0], k, lane_mask(builder, builder.sub(count, k), values))
        result = mixed(builder, start, count)
        for total in totals:
            lanes = builder.load(total)
            for k in range(lane_count):
                result = mixed(builder, result, builder.extract_element(lanes, ir.Constant(ir.IntType(32), k)))
        return result

    return types.int64(pointer, types.int64, types.int64), codegen


# Threads.


@intrinsic
def atomic_add(typingctx, pointer, index, amount):
    """Add to the int64 at ``pointer[index]`` and return what stood there; what was written before is seen by who reads.

    Ordered as a lock's release and acquire at once.
    """

    def codegen(context, builder, sig, args):
        return builder.atomic_rmw("add", builder.gep(args[0], [args[1]]), args[2], "acq_rel")

    return types.int64(pointer, types.int64, types.int64), codegen


@intrinsic
def atomic_load(typingctx, pointer, index):
    """The int64 at ``pointer[index]``, together with all that was written before it was (acquire)."""

    def codegen(context, builder, sig, args):
        return builder.load_atomic(builder.gep(args[0], [args[1]]), "acquire", 8)

    return types.int64(pointer, types.int64), codegen


@intrinsic
def pause(typingctx):
    """Tell the processor that this is a loop that waits."""

    def codegen(context, builder, sig, args):
        triple = llvmlite.binding.get_default_triple()
        if triple.startswith(("x86_64", "i386", "i686")):
            function_type = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, function_type, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def call_function(typingctx, address):
    """Call the C function ``int f(void)`` at ``address`` and return its result."""

    def codegen(context, builder, sig, args):
        function_type = ir.FunctionType(ir.IntType(32), [])
        return builder.sext(builder.call(builder.inttoptr(args[0], function_type.as_pointer()), []), ir.IntType(64))

    return types.int64(types.int64), codegen


# Selection. Comparisons are ordered so that NaN takes the branch that keeps it.


def _select_intrinsic(emit):
    @intrinsic
    def function(typingctx, a, b):
        vector = a if isinstance(a, Vector) else b

        def codegen(context, builder, sig, args):
            return emit(builder, vector, *args)

        return vector(vector, vector), codegen

    return function


def _emit_at_least(builder, vector, x, bound):
    return builder.select(builder.fcmp_ordered("<", x, bound), bound, x)


def _emit_at_most(builder, vector, x, bound):
    return builder.select(builder.fcmp_ordered(">", x, bound), bound, x)


def _emit_zero_unless_positive(builder, vector, x, condition):
    zero = _constant(vector, 0)
    return builder.select(builder.fcmp_ordered("<=", condition, zero), zero, x)


at_least = _select_intrinsic(_emit_at_least)
at_most = _select_intrinsic(_emit_at_most)
zero_unless_positive = _select_intrinsic(_emit_zero_unless_positive)


@intrinsic
def where_below(typingctx, x, bound, below, otherwise):
    """``below`` in the lanes where ``x < bound``, else ``otherwise`` (also where x is NaN)."""

    def codegen(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), args[2], args[3])

    return x(x, x, x, x), codegen


@intrinsic
def with_sign_of(typingctx, magnitude, sign):
    """``|magnitude|`` with the sign of ``sign``, lane by lane."""
    vector = magnitude

    def codegen(context, builder, sig, args):
        llvm = _llvm_type(vector)
        function_type = ir.FunctionType(llvm, [llvm, llvm])
        name = f"llvm.copysign.{_suffix(llvm)}"
        return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), args)

    return vector(vector, vector), codegen


@intrinsic
def magnitude(typingctx, vector):
    """``|vector|``, lane by lane."""

    def codegen(context, builder, sig, args):
        llvm = _llvm_type(vector)
        name = f"llvm.fabs.{_suffix(llvm)}"
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(llvm, [llvm]), name)
        return builder.call(function, args)

    return vector(vector), codegen


# 2**n for a vector n of whole numbers. ``ROUNDER + n`` holds n in the low bits of its mantissa, so that one shift moves
# it into the exponent. Adding and subtracting ROUNDER also rounds to the nearest whole number.
_MANTISSA_BITS = {types.float32: 23, types.float64: 52}
_EXPONENT_BIAS = {types.float32: 127, types.float64: 1023}


@intrinsic
def rounder(typingctx, like):
    """The number 1.5 * 2**mantissa_bits as a vector."""

    def codegen(context, builder, sig, args):
        return _constant(like, 1.5 * 2.0 ** _MANTISSA_BITS[like.dtype])

    return like(like), codegen


@intrinsic
def power_of_two(typingctx, shifted):
    """``2**n`` from ``shifted = rounder + n``; n = 128 (1024 in float64) gives infinity."""
    vector = shifted

    def codegen(context, builder, sig, args):
        bits = ir.IntType(vector.dtype.bitwidth)
        integers = ir.VectorType(bits, vector.lanes)
        shift = ir.Constant(integers, [_MANTISSA_BITS[vector.dtype]] * vector.lanes)
        bias = _EXPONENT_BIAS[vector.dtype] << _MANTISSA_BITS[vector.dtype]
        exponent = builder.shl(builder.bitcast(args[0], integers), shift)
        total = builder.add(exponent, ir.Constant(integers, [bias] * vector.lanes))
        return builder.bitcast(total, _llvm_type(vector))

    return vector(vector), codegen


@intrinsic
def is_single_precision(typingctx, like):
    """Whether ``like`` is a vector of float32: a constant, so that the other branch vanishes."""

    def codegen(context, builder, sig, args):
        return ir.Constant(ir.IntType(1), int(like.dtype == types.float32))

    return types.boolean(like), codegen
