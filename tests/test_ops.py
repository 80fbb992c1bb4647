"""The operators by themselves: what torch.library asks of one, and what memory and threads may not change."""

import itertools

import pytest
import torch
from helpers import assert_within_rule
from torch.library import opcheck

import fastrnn  # noqa: F401  (defines the operators)
from fastrnn import functional, ops, reference
from fastrnn.kernels import numba_layer

INPUT, HIDDEN, PROJECTED, BATCH, STEPS = 4, 5, 2, 3, 4
BATCH_SIZES = (3, 3, 2, 1)
MANY_BATCH_SIZES = (40, 40, 31, 20, 7, 7, 1)

CELLS = ("rnn_tanh", "rnn_relu", "gru", "lstm", "lstm_proj")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

cells = pytest.mark.parametrize("cell", CELLS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
both_forms = pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
# Every dtype, form and direction, not each with each.
forms = pytest.mark.parametrize(
    ("dtype", "packed", "reverse"),
    [
        (torch.float32, False, (0,)),
        (torch.float32, True, (0, 1)),
        (torch.float64, False, (0, 1)),
        (torch.bfloat16, True, (1,)),
        (torch.float16, False, (0, 1, 0)),
    ],
    ids=["float32-dense-one", "float32-packed-both", "float64-dense-both", "bfloat16-packed-back", "float16-dense-3"],
)
directions = pytest.mark.parametrize("reverse", [(0,), (0, 1)], ids=["one", "both"])


@pytest.fixture
def poisoned_memory():
    """Fills what torch.empty returns with NaN, so that a number nobody wrote is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def forward_arguments(
    cell, dtype, packed=False, reverse=(0,), save=True, batch=BATCH, hidden=HIDDEN, steps=STEPS, batch_sizes=BATCH_SIZES
):
    """Arguments of ``layer_forward``, in its order."""
    projected = cell.endswith("_proj")
    cell = cell.removesuffix("_proj")
    state = PROJECTED if projected else hidden
    gate = hidden * reference.CELLS[cell].gates
    rows, batch = (sum(batch_sizes), batch_sizes[0]) if packed else (steps * batch, batch)
    groups = len(reverse)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    return [
        "numba",
        cell,
        draw(rows, 1, INPUT),
        draw(groups, gate, INPUT) / 2,
        draw(groups, gate),
        draw(groups, gate, state) / 2,
        draw(groups, gate),
        draw(groups, state, hidden) if projected else None,
        draw(groups, batch, state),
        draw(groups, batch, hidden) if cell == "lstm" else None,
        torch.tensor(batch_sizes) if packed else None,
        list(reverse),
        save,
    ]


def backward_arguments(arguments, absent=(), examples=1, needs=None):
    """Arguments of ``layer_backward`` after ``layer_forward(*arguments)``, without the gradients ``absent``."""
    backend, cell, x, weight_ih, _, weight_hh, _, weight_hr, _, _, batch_sizes, reverse, _ = arguments
    output, h_n, c_n, gates, hidden_prev, cell_prev, _ = ops.layer_forward(*arguments)
    is_lstm = cell == "lstm"
    incoming = {"d_output": output.cos(), "d_h_n": h_n.cos(), "d_c_n": c_n.cos() if is_lstm else None}
    return [
        backend,
        cell,
        *(None if name in absent else tensor for name, tensor in incoming.items()),
        gates,
        hidden_prev,
        cell_prev if is_lstm else None,
        *(x, weight_ih, weight_hh, weight_hr),
        h_n.shape[1],
        batch_sizes,
        reverse,
        examples,
        [True] * 5 + [weight_hr is not None] if needs is None else needs,
    ]


def tensors(values):
    return [value for value in values if isinstance(value, torch.Tensor)]


def run_both(arguments):
    """All results of a forward and a backward scan."""
    results = ops.layer_forward(*arguments)
    return [*results, *ops.layer_backward(*backward_arguments(arguments))]


# What torch.library asks of an operator: schema, fake results, autograd and AOTAutograd with static and dynamic shapes


@cells
@forms
def test_opcheck_of_forward(cell, dtype, packed, reverse):
    arguments = forward_arguments(cell, dtype, packed, reverse)
    opcheck(ops.layer_forward, arguments)
    opcheck(ops.layer_forward, [*arguments[:-1], False])
    if arguments[1] == "lstm":
        opcheck(ops.layer_forward, [*arguments, None, True])


@cells
@forms
def test_opcheck_of_backward(cell, dtype, packed, reverse):
    arguments = forward_arguments(cell, dtype, packed, reverse)
    opcheck(ops.layer_backward, backward_arguments(arguments))
    if arguments[1] == "lstm":
        d_cells = ops.layer_forward(*arguments, None, True)[6].cos()
        opcheck(ops.layer_backward, [*backward_arguments(arguments), None, d_cells])


@cells
@pytest.mark.parametrize(
    "absent", [{"d_output"}, {"d_h_n", "d_c_n"}, {"d_output", "d_h_n"}], ids=lambda names: "_and_".join(sorted(names))
)
def test_opcheck_of_backward_with_absent_gradients(cell, absent):
    opcheck(ops.layer_backward, backward_arguments(forward_arguments(cell, torch.float32), absent))


@cells
@pytest.mark.parametrize("save", [False, True], ids=["lean", "save"])
def test_opcheck_of_forward_with_gradients(cell, save):
    """The operator called by itself, as exported programs do, has a first derivative."""
    arguments = forward_arguments(cell, torch.float64, reverse=(0, 1), save=save)
    for argument in tensors(arguments):
        argument.requires_grad_()
    opcheck(ops.layer_forward, arguments)


@cells
@both_forms
def test_derivative_of_the_operator_by_itself(cell, packed):
    arguments = forward_arguments(cell, torch.float64, packed, (0, 1), save=False, hidden=3)
    places = [index for index, argument in enumerate(arguments) if index in range(2, 10) and argument is not None]

    def scan(*leaves):
        for index, leaf in zip(places, leaves, strict=True):
            arguments[index] = leaf
        if cell.startswith("lstm"):
            output, h_n, c_n, *_, cells = ops.layer_forward(*arguments, None, True)
            return output, h_n, c_n, cells
        return ops.layer_forward(*arguments)[:2]

    leaves = [arguments[index].requires_grad_() for index in places]
    assert torch.autograd.gradcheck(scan, leaves, fast_mode=True)


# Shapes, dtypes and memory of the results


@cells
@dtypes
@both_forms
@pytest.mark.parametrize("save", [False, True], ids=["lean", "save"])
def test_results_never_alias_and_are_no_views(cell, dtype, packed, save):
    arguments = forward_arguments(cell, dtype, packed, (0, 1), save)
    before = [tensor.clone() for tensor in tensors(arguments)]
    calls = [(tensors(arguments), ops.layer_forward(*arguments))]
    if save:
        backward = backward_arguments(arguments)
        calls.append((tensors(backward), ops.layer_backward(*backward)))
    for inputs, results in calls:
        storages = [tensor.untyped_storage().data_ptr() for tensor in [*inputs, *results] if tensor.numel()]
        assert len(storages) == len(set(storages)) + _shared(inputs)
        for result in results:
            assert not result._is_view()
            assert result.is_contiguous()
            assert result.storage_offset() == 0
            assert result.untyped_storage().nbytes() == result.nbytes
            assert result.dtype == dtype
    assert all(torch.equal(*pair) for pair in zip(tensors(arguments), before, strict=True))


def _shared(inputs):
    storages = [tensor.untyped_storage().data_ptr() for tensor in inputs if tensor.numel()]
    return len(storages) - len(set(storages))


@cells
def test_nothing_is_kept_unless_asked_for(cell):
    lean = ops.layer_forward(*forward_arguments(cell, torch.float32, save=False))
    saving = ops.layer_forward(*forward_arguments(cell, torch.float32, save=True))
    assert [result.numel() for result in lean[3:]] == [0, 0, 0, 0]
    assert all(result.numel() for result in saving[3:5])
    assert all(torch.equal(*pair) for pair in zip(lean[:3], saving[:3], strict=True))


@cells
@dtypes
@both_forms
def test_results_do_not_depend_on_uninitialised_memory(cell, dtype, packed, poisoned_memory):
    arguments = forward_arguments(cell, dtype, packed, (0, 1))
    poisoned = run_both(arguments)
    torch.use_deterministic_algorithms(False)
    clean = run_both(arguments)
    for mine, other in zip(poisoned, clean, strict=True):
        assert mine.isfinite().all()
        assert torch.equal(mine, other)


@cells
@pytest.mark.parametrize("hidden", [1, 7, 18, 33])
@pytest.mark.parametrize("batch", [1, 13])
def test_odd_sizes_do_not_depend_on_uninitialised_memory(cell, hidden, batch, poisoned_memory):
    """Blocks and vectors that the sizes do not fill."""
    if cell == "lstm_proj" and hidden == 1:
        hidden = 2 * PROJECTED
    for result in run_both(forward_arguments(cell, torch.float32, reverse=(0, 1), batch=batch, hidden=hidden)):
        assert result.isfinite().all()


# Bits


@cells
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@both_forms
def test_the_same_bits_in_every_run_and_with_any_number_of_threads(cell, dtype, packed, monkeypatch):
    used = set()
    run = numba_layer.run
    monkeypatch.setattr(numba_layer, "run", lambda *arguments: (used.add(arguments[-1]), run(*arguments)))
    arguments = forward_arguments(
        cell, dtype, packed, (0, 1), batch=40, hidden=96, steps=9, batch_sizes=MANY_BATCH_SIZES
    )
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 1, 2):
            torch.set_num_threads(threads)
            results.append(run_both(arguments))
    finally:
        torch.set_num_threads(before)
    if cell != "lstm_proj":
        assert used == {1, 2}  # the sizes are large enough for a second thread
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


# The reference says what the numbers are


@cells
@both_forms
@directions
def test_forward_against_the_reference(cell, packed, reverse):
    """In float64, from the operator's own arguments."""
    arguments = forward_arguments(cell, torch.float64, packed, reverse)
    _, name, *inputs, _, _, _ = arguments
    expected = reference.layer(name, *inputs, arguments[10], reverse)
    if name == "lstm":
        output, h_n, c_n, *_, cells = ops.layer_forward(*arguments, None, True)
        results = output, h_n, c_n, cells
    else:
        results = ops.layer_forward(*arguments)[:2]
    for mine, theirs in itertools.zip_longest(results, expected):
        if theirs is not None:
            assert_within_rule(mine, theirs, theirs)


@cells
@both_forms
@directions
def test_backward_against_the_reference(cell, packed, reverse):
    """In float64; and a gradient that is not asked for is not there and changes no other."""
    arguments = forward_arguments(cell, torch.float64, packed, reverse)
    _, name, *inputs, _, _, _ = arguments
    leaves = [None if tensor is None else tensor.clone().requires_grad_() for tensor in inputs]
    results = reference.layer(name, *leaves, arguments[10], reverse)[: 3 if name == "lstm" else 2]
    cotangents = [result.detach().cos() for result in results]
    expected = torch.autograd.grad(results, [leaf for leaf in leaves if leaf is not None], cotangents)
    gradients = ops.layer_backward(*backward_arguments(arguments))
    there = [
        gradient[0] if 1 <= index <= 5 else gradient  # the dimension of examples
        for index, (gradient, leaf) in enumerate(zip(gradients, leaves, strict=True))
        if leaf is not None
    ]
    for mine, theirs in zip(there, expected, strict=True):
        assert_within_rule(mine, theirs, theirs)
    for absent in range(6):
        needs = [index != absent and (index < 5 or inputs[5] is not None) for index in range(6)]
        fewer = ops.layer_backward(*backward_arguments(arguments, needs=needs))
        assert fewer[absent].numel() == 0
        assert all(
            torch.equal(a, b) for index, (a, b) in enumerate(zip(fewer, gradients, strict=True)) if index != absent
        )


def test_bad_arguments_are_refused():
    """The operators check what their kernels trust."""
    good = forward_arguments("gru", torch.float32, packed=True)
    rows = sum(BATCH_SIZES)
    for index, bad in (
        (2, torch.zeros(rows + 1, 1, INPUT)),
        (2, torch.zeros(rows, 2, INPUT)),
        (3, torch.zeros(1, 3 * HIDDEN, INPUT + 1)),
        (4, torch.zeros(1, 3 * HIDDEN - 1)),
        (5, torch.zeros(1, 3 * HIDDEN, HIDDEN + 1)),
        (6, torch.zeros(1, HIDDEN)),
        (8, torch.zeros(1, BATCH - 1, HIDDEN)),
        (10, torch.tensor([1, 2, 3, 3])),
        (10, torch.tensor([4, 3, 2])),
        (10, torch.tensor([3, 3, 2, 2, -1])),
        (11, [0, 1]),
    ):
        with pytest.raises(RuntimeError, match="fastrnn: "):
            ops.layer_forward(*good[:index], bad, *good[index + 1 :])
    backward = backward_arguments(good)
    for index, bad in (
        (2, torch.zeros(1, HIDDEN)),
        (5, torch.zeros(rows, 1, HIDDEN)),
        (6, torch.zeros(rows, 1, HIDDEN + 1)),
        (8, torch.zeros(rows + 1, 1, INPUT)),
        (9, torch.zeros(1, 3 * HIDDEN, INPUT + 1)),
        (12, BATCH - 1),
        (15, 2),
    ):
        with pytest.raises(RuntimeError, match="fastrnn: "):
            ops.layer_backward(*backward[:index], bad, *backward[index + 1 :])


@cells
def test_layer_passes_the_operators_no_views_of_its_results(cell):
    """``functional.layer``: what comes out may be changed in place, and leaves the inputs alone."""
    name = cell.removesuffix("_proj")
    state, gates = (PROJECTED if cell == "lstm_proj" else HIDDEN), reference.CELLS[name].gates
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": (STEPS * BATCH, 1, 3),
        "weight_ih": (2, gates * HIDDEN, 3),
        "bias_ih": (2, gates * HIDDEN),
        "weight_hh": (2, gates * HIDDEN, state),
        "bias_hh": (2, gates * HIDDEN),
        "weight_hr": (2, PROJECTED, HIDDEN) if cell == "lstm_proj" else None,
        "h0": (2, BATCH, state),
        "c0": (2, BATCH, HIDDEN) if name == "lstm" else None,
    }
    inputs = [None if shape is None else torch.randn(shape, generator=generator) for shape in shapes.values()]
    for leaf in (False, True):
        for tensor in tensors(inputs):
            tensor.requires_grad_(leaf)
        results = functional.layer("numba", name, *inputs, None, [0, 1])
        copies = [result.clone() for result in results]
        storages = [tensor.untyped_storage().data_ptr() for tensor in [*tensors(inputs), *results]]
        assert len(storages) == len(set(storages))
        for result in results:
            assert not result._is_view()
            result.zero_()
        again = functional.layer("numba", name, *inputs, None, [0, 1])
        assert all(torch.equal(*pair) for pair in zip(again, copies, strict=True))
