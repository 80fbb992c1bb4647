"""Steps of a cell without gradients, which take a call that was prepared before: what may change in between."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import CELL_CLASSES, FLOAT64_AGREEMENT, assert_within_rule, in_float64, make_pair
from torch import nn

import fastrnn

BATCH, FEATURES, HIDDEN = 3, 4, 6
cells = pytest.mark.parametrize("name", CELL_CLASSES)


def state_of(name, batch=BATCH, hidden=HIDDEN, dtype=torch.float64):
    parts = tuple(torch.randn(batch, hidden, dtype=dtype) for _ in range(2))
    return parts if name == "LSTMCell" else parts[0]


def pair_of(name, **options):
    ours, theirs = make_pair(name, FEATURES, HIDDEN, **options)
    return ours.double(), theirs.double()


def parts(result):
    return result if isinstance(result, tuple) else (result,)


def assert_same(ours, theirs, x, hx):
    before = [part.clone() for part in parts(hx)]
    with torch.no_grad():
        results, expected = parts(ours(x, hx)), parts(theirs(x, hx))
    for mine, other in zip(results, expected, strict=True):
        assert not mine.requires_grad
        assert (mine - other).abs().max() <= FLOAT64_AGREEMENT
    assert all(torch.equal(*pair) for pair in zip(parts(hx), before, strict=True))
    return results if len(results) > 1 else results[0]


@cells
@pytest.mark.parametrize("bias", [True, False])
def test_a_loop_over_time(name, bias):
    ours, theirs = pair_of(name, bias=bias)
    hx, seen = state_of(name), []
    for _ in range(4):
        hx = assert_same(ours, theirs, torch.randn(BATCH, FEATURES, dtype=torch.float64), hx)
        seen.append((hx, [part.clone() for part in parts(hx)]))
    for state, copies in seen:  # a later step writes to none of the results before it
        assert all(torch.equal(*pair) for pair in zip(parts(state), copies, strict=True))


@cells
def test_sizes_and_dtypes_in_turn(name):
    ours, theirs = pair_of(name)
    for batch in (3, 1, 40, 3):
        assert_same(ours, theirs, torch.randn(batch, FEATURES, dtype=torch.float64), state_of(name, batch))
    ours.float(), theirs.float()
    with torch.no_grad():
        x, hx = torch.randn(BATCH, FEATURES), state_of(name, dtype=torch.float32)
        exact = copy.deepcopy(theirs).double()(x.double(), in_float64(hx))
        for mine, other, reference in zip(parts(ours(x, hx)), parts(theirs(x, hx)), parts(exact), strict=True):
            assert_within_rule(mine, other, reference)


@cells
@pytest.mark.parametrize("hidden", [300, 520])
def test_threads_that_share_the_units(name, hidden):
    before = torch.get_num_threads()
    ours, theirs = (module.double() for module in make_pair(name, hidden, hidden))
    x, hx = torch.randn(2, hidden, dtype=torch.float64), state_of(name, 2, hidden)
    try:
        for threads in (2, 1, 2):
            torch.set_num_threads(threads)
            assert_same(ours, theirs, x, hx)
            assert_same(ours, theirs, x, hx)
    finally:
        torch.set_num_threads(before)


@cells
def test_changed_weights_count_at_once(name):
    ours, theirs = pair_of(name)
    x, hx = torch.randn(BATCH, FEATURES, dtype=torch.float64), state_of(name)

    def replace(module):
        module.weight_hh = nn.Parameter(module.weight_hh.detach().cos())

    changes = [
        lambda module: module.weight_ih.data.mul_(0.5),
        lambda module: module.bias_hh.data.add_(1),
        replace,
        lambda module: setattr(module.weight_ih, "data", module.weight_ih.data.sin()),
        lambda module: module.load_state_dict({key: value / 2 for key, value in module.state_dict().items()}),
    ]
    assert_same(ours, theirs, x, hx)
    for change in changes:
        with torch.no_grad():
            change(ours), change(theirs)
        assert_same(ours, theirs, x, hx)


@cells
def test_arguments_that_are_not_plain(name):
    """Not contiguous, lazily negated, of a wrong shape: torch.nn's numbers or errors, and the state left alone."""
    ours, theirs = pair_of(name)
    x, hx = torch.randn(BATCH, FEATURES, dtype=torch.float64), state_of(name)
    assert_same(ours, theirs, x, hx)
    assert_same(ours, theirs, torch.randn(FEATURES, BATCH, dtype=torch.float64).t(), hx)
    assert_same(ours, theirs, torch._neg_view(x), hx)
    assert_same(ours, theirs, x[0], tuple(p[0] for p in hx) if name == "LSTMCell" else hx[0])
    wrong_state = state_of(name, BATCH + 1)
    for arguments in ((x[:, :-1], hx), (x.float(), hx), (x, wrong_state), (x[None], hx)):
        with torch.no_grad(), pytest.raises((RuntimeError, ValueError)):
            ours(*arguments)
    ours.weight_hh.data = torch.zeros(3, 3, dtype=torch.float64)
    with torch.no_grad(), pytest.raises((RuntimeError, ValueError)):
        ours(x, hx)


@cells
def test_gradients_are_kept_where_they_are_wanted(name):
    ours, _ = pair_of(name)
    x, hx = torch.randn(BATCH, FEATURES, dtype=torch.float64), state_of(name)
    with torch.no_grad():
        ours(x, hx)
    assert parts(ours(x, hx))[0].requires_grad
    with torch.inference_mode():
        assert parts(ours(x, hx))[0].is_inference()
    assert parts(ours(x, hx))[0].requires_grad


@cells
def test_backends_copies_and_threads(name):
    ours, theirs = pair_of(name)
    x, hx = torch.randn(BATCH, FEATURES, dtype=torch.float64), state_of(name)
    assert_same(ours, theirs, x, hx)
    for backend in ("torch", "reference", "numba"):
        with fastrnn.use_backend(backend):
            assert_same(ours, theirs, x, hx)
    for duplicate in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        duplicate.weight_ih.data.zero_()
        assert_same(ours, theirs, x, hx)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: [assert_same(ours, theirs, x, hx) for _ in range(50)], range(4)))


@cells
def test_functional_call_and_vmap(name):
    ours, theirs = pair_of(name)
    x, hx = torch.randn(BATCH, FEATURES, dtype=torch.float64), state_of(name)
    with torch.no_grad():
        ours(x, hx)
        halved = {key: value / 2 for key, value in ours.state_dict().items()}
        mine = parts(torch.func.functional_call(ours, halved, (x, hx)))
        other = parts(torch.func.functional_call(theirs, halved, (x, hx)))
        mapped = parts(torch.func.vmap(lambda row: ours(row[None], None))(x))
        alone = parts(theirs(x, None))
    assert all((a - b).abs().max() <= 1e-12 for a, b in zip(mine, other, strict=True))
    assert all((a[:, 0] - b).abs().max() <= 1e-12 for a, b in zip(mapped, alone, strict=True))
