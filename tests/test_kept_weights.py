"""Inference keeps packed weights from call to call: whatever way they change, the next call sees it."""

import threading

import pytest
import torch
from helpers import assert_within_rule, in_float64, make_pair
from numba import njit, types

import fastrnn
from fastrnn.kernels import numba_layer
from fastrnn.kernels.numba_simd import as_pointer, checksum

LAYERS = {
    "rnn": ("RNN", {}),
    "gru": ("GRU", {"bidirectional": True}),
    "lstm": ("LSTM", {"num_layers": 2}),
    "lstm_proj": ("LSTM", {"proj_size": 5}),
}
# More rows than are multiplied with unpacked weights.
STEPS, BATCH, FEATURES = 3, 40, 21

# Ways to change a weight that count up no version of it, and do not leave its sums or its values as a set alone.
CHANGES = {
    "one value": lambda weight: weight[-1, -1:].add_(1),
    "signs": lambda weight: weight.neg_(),
    "a column": lambda weight: weight[:, 2].neg_(),
    "rows": lambda weight: weight.copy_(weight.roll(1, 0)),
    "columns": lambda weight: weight.copy_(weight.flip(1)),
    "by numpy": lambda weight: weight.numpy().__setitem__((1, 1), 7.0),
}


def check(ours, theirs, x) -> None:
    with fastrnn.use_backend("numba"), torch.no_grad():
        mine, torchs = ours(x)[0], theirs(x)[0]
        exact = in_float64(theirs)(x.double())[0]
    assert_within_rule(mine, torchs, exact)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("hidden", [9, 70])
def test_a_changed_weight_is_seen(name, hidden, change):
    class_name, options = LAYERS[name]
    ours, theirs = make_pair(class_name, FEATURES, hidden, **options)
    x = torch.randn(STEPS, BATCH, FEATURES)
    check(ours, theirs, x)
    check(ours, theirs, x)
    for parameter in ("weight_ih_l0", "weight_hh_l0", *(["weight_hr_l0"] if "proj_size" in options else [])):
        for layer in (ours, theirs):
            CHANGES[change](getattr(layer, parameter).data)
        check(ours, theirs, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    ours, theirs = (layer.to(dtype) for layer in make_pair("LSTM", FEATURES, 70))
    x = torch.randn(STEPS, BATCH, FEATURES).to(dtype)
    check(ours, theirs, x)
    for change in CHANGES.values():
        if change is CHANGES["by numpy"] and dtype == torch.bfloat16:
            continue  # numpy has no such type
        for layer in (ours, theirs):
            change(layer.weight_hh_l0.data)
        check(ours, theirs, x)


@njit(error_model="numpy")
def sum_of(address, count):
    return checksum(as_pointer(address, types.float32(0)), count, types.int64(1))


def test_a_checksum_tells_every_bit():
    """Whatever the kernels' results: changes of the last bits keep the tolerance rule."""
    generator = torch.Generator().manual_seed(0)
    for count in (1, 3, 16, 17, 63, 64, 65, 200):
        values = torch.randn(count + 1, generator=generator)
        bits, seen = values.view(torch.int32), set()

        def now(values=values, count=count):
            return sum_of(values.data_ptr(), count)

        before = now()
        for place in range(count):
            for bit in (0, 13, 31):
                flip = -(2**31) if bit == 31 else 1 << bit
                bits[place] ^= flip
                seen.add(now())
                bits[place] ^= flip
        assert now() == before
        assert before not in seen
        assert len(seen) == 3 * count
        bits[count] ^= 1  # behind the last value
        assert now() == before


def test_a_checksum_tells_changes_of_many_values():
    values = torch.randn(256, generator=torch.Generator().manual_seed(0)).view(16, 16)
    seen = {sum_of(values.data_ptr(), 256)}
    # neighbours in one lane of the sum, the same change to all values, and all values in another order
    for changed in (
        values * torch.where(torch.arange(16) == 3, -1, 1),
        values * torch.where(torch.arange(16) == 3, -1, 1)[:, None],
        -values,
        values * 2,
        values + 0.0 * values.neg(),
        values.roll(1, 0),
        values.roll(1, 1),
        values.t().contiguous(),
        values.flip(0, 1),
        torch.zeros(16, 16),
        -torch.zeros(16, 16),
    ):
        seen.add(sum_of(changed.data_ptr(), 256))
    # one of them changes nothing
    assert len(seen) == 11


def test_weights_of_fewer_bytes_than_a_vector():
    for hidden in (1, 2):
        for class_name in ("RNN", "GRU", "LSTM"):
            ours, theirs = (layer.double() for layer in make_pair(class_name, FEATURES, hidden))
            x = torch.randn(STEPS, BATCH, FEATURES, dtype=torch.float64)
            with torch.no_grad(), fastrnn.use_backend("numba"):
                for _ in range(2):
                    assert (ours(x)[0] - theirs(x)[0]).abs().max() <= 1e-12


def test_weights_that_are_trained_between_calls_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(numba_layer, "_kept", numba_layer._Kept())
    layer, x = fastrnn.GRU(FEATURES, 9), torch.randn(STEPS, BATCH, FEATURES)
    with torch.no_grad(), fastrnn.use_backend("numba"):
        for _ in range(2 * numba_layer.KEPT_LAYERS):
            layer.weight_hh_l0.add_(0.01)
            layer(x)
    assert len(numba_layer._kept.panels) == numba_layer.KEPT_LAYERS


def test_layers_alike_do_not_take_each_others_weights():
    pairs = [make_pair("LSTM", FEATURES, 30, seed=seed) for seed in range(3)]
    # begins with the same values as the first
    pairs.append(make_pair("LSTM", FEATURES, 30))
    for layer in pairs[-1]:
        layer.weight_hh_l0.data[50:].neg_()
        layer.weight_ih_l0.data.neg_()
    x = torch.randn(STEPS, BATCH, FEATURES)
    for _ in range(3):
        for ours, theirs in pairs:
            check(ours, theirs, x)


def test_what_is_kept_has_a_limit(monkeypatch):
    monkeypatch.setattr(numba_layer, "_kept", numba_layer._Kept())
    pairs = [make_pair("GRU", FEATURES, hidden, seed=hidden) for hidden in (30, 31, 30, 64, 30, 90)]
    x = torch.randn(STEPS, BATCH, FEATURES)
    kept = numba_layer._kept.panels
    check(*pairs[0], x)
    monkeypatch.setattr(numba_layer, "KEPT_BYTES", 3 * next(iter(kept.values())).numel())
    numba_layer.make_plan.cache_clear()
    for _ in range(2):
        for ours, theirs in pairs:
            check(ours, theirs, x)
            assert sum(memory.numel() for memory in kept.values()) <= numba_layer.KEPT_BYTES
    numba_layer.make_plan.cache_clear()


def test_training_keeps_nothing(monkeypatch):
    monkeypatch.setattr(numba_layer, "_kept", numba_layer._Kept())
    layer, x = fastrnn.LSTM(FEATURES, 30), torch.randn(STEPS, BATCH, FEATURES)
    layer(x)[0].sum().backward()
    assert not numba_layer._kept.panels


def test_threads_have_weights_of_their_own():
    ours, theirs = make_pair("LSTM", FEATURES, 70)
    x, problems = torch.randn(STEPS, BATCH, FEATURES), []

    def run():
        try:
            for _ in range(20):
                check(ours, theirs, x)
        except Exception as problem:
            problems.append(problem)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


@pytest.mark.parametrize("class_name", ["RNN", "GRU", "LSTM"])
def test_a_stream_of_many_sequences_sees_changes(class_name):
    ours, theirs = make_pair(class_name, FEATURES, 33)
    stream, x = fastrnn.Stream(ours, BATCH), torch.randn(BATCH, FEATURES)
    with torch.no_grad():
        for change in CHANGES.values():
            stream.reset()
            mine, torchs = stream.step(x), theirs(x[None])[0][0]
            assert_within_rule(mine, torchs, in_float64(theirs)(x.double()[None])[0][0])
            for layer in (ours, theirs):
                change(layer.weight_hh_l0.data)
                change(layer.weight_ih_l0.data)
