"""``checkpoint=``: the numbers of a layer that keeps everything, in the memory of one that does not."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import LAYERS, layers
from helpers import CPU_BACKENDS, FLOAT64_AGREEMENT, assert_same_as_torch, make_pair, random_packed, random_state, run

import fastrnn

FEATURES, HIDDEN, BATCH, STEPS = 3, 6, 4, 11


def draw(name, every, packed=False, dtype=torch.float64, **options):
    class_name, variant = LAYERS[name]

    def make(seed):
        ours, theirs = make_pair(class_name, FEATURES, HIDDEN, seed=seed, dtype=dtype, **variant, **options)
        ours.checkpoint = every
        if packed:
            input = random_packed(BATCH, STEPS, FEATURES, dtype, seed)
        else:
            input = torch.randn(STEPS, BATCH, FEATURES, generator=torch.Generator().manual_seed(seed)).to(dtype)
        return ours, theirs, input, random_state(theirs, BATCH, dtype, seed)

    return make


@pytest.mark.parametrize("backend", [name for name in CPU_BACKENDS if name != "reference"])
@pytest.mark.parametrize("every", [1, 4, 11, 50])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
@layers
def test_outputs_and_gradients(name, bidirectional, packed, every, backend):
    case = draw(name, every, packed, bidirectional=bidirectional, num_layers=2)
    assert_same_as_torch(case, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@layers
def test_lower_precision(name, dtype):
    assert_same_as_torch(draw(name, 3, dtype=dtype, bidirectional=True))


@pytest.mark.parametrize("only", ["input", "weight_hh_l0", "hx"])
@layers
def test_what_needs_no_gradient(name, only):
    results = []
    for every in (None, 3):
        ours, _, input, hx = draw(name, every)(0)
        states = list(hx) if isinstance(hx, tuple) else [hx]
        leaf = {"input": input, "hx": states[0]}.get(only)
        for parameter in ours.parameters():
            parameter.requires_grad_(False)
        leaf = ours.get_parameter(only) if leaf is None else leaf
        leaf.requires_grad_()
        output, _ = ours(input, tuple(states) if isinstance(hx, tuple) else states[0])
        results.append(torch.autograd.grad(output.square().sum(), leaf)[0])
    torch.testing.assert_close(*results, rtol=0, atol=FLOAT64_AGREEMENT)


@layers
def test_only_the_final_state_is_used(name):
    results = []
    for every in (None, 3):
        ours, _, input, hx = draw(name, every)(0)
        _, final = ours(input.requires_grad_(), hx)
        final = final[-1] if isinstance(final, tuple) else final
        results.append(torch.autograd.grad(final.sin().sum(), [input, *ours.parameters()], allow_unused=True))
    for mine, other in zip(*results, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other, rtol=0, atol=FLOAT64_AGREEMENT)


@layers
def test_second_derivatives_and_transforms(name):
    ours, _, input, _ = draw(name, 3)(0)
    input = input[:5, :2]
    assert torch.autograd.gradgradcheck(lambda x: ours(x)[0], input.clone().requires_grad_())

    def loss(parameters, x):
        return torch.func.functional_call(ours, parameters, (x,))[0].sum()

    parameters = dict(ours.named_parameters())
    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1))(parameters, input[:, :, None])
    alone = torch.func.grad(loss)(parameters, input[:, 1, None])
    for key, gradient in alone.items():
        torch.testing.assert_close(together[key][1], gradient, rtol=0, atol=FLOAT64_AGREEMENT)


def test_compile():
    ours, _, input, hx = draw("lstm", 3)(0)
    expected, got = run(ours, input, hx), run(torch.compile(ours, fullgraph=True, backend="aot_eager"), input, hx)
    for name, result in expected.items():
        torch.testing.assert_close(got[name.replace("grad ", "grad _orig_mod.") if "_l0" in name else name], result)


def test_copies_keep_it_and_repr_shows_it():
    layer = fastrnn.GRU(3, 4, checkpoint=5)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.checkpoint == 5
    assert repr(layer) == "GRU(3, 4, checkpoint=5)"
    assert repr(fastrnn.GRU(3, 4)) == "GRU(3, 4)"
    assert fastrnn.convert(torch.nn.GRU(3, 4)).checkpoint is None


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "5"])
def test_bad_values(value):
    with pytest.raises(ValueError, match="checkpoint should be None or a number of time steps"):
        fastrnn.LSTM(3, 4, checkpoint=value)
    layer = fastrnn.convert(torch.nn.LSTM(3, 4))
    with pytest.raises(ValueError, match="checkpoint should be None or a number of time steps"):
        layer.checkpoint = value


@pytest.mark.parametrize("every", [None, 2])
@layers
def test_batched_gradients(name, every):
    ours, theirs, input, _ = draw(name, every)(0)
    several = torch.randn(3, STEPS, BATCH, ours.proj_size or HIDDEN, dtype=torch.float64)
    results = []
    for module in (ours, theirs):
        x = input.clone().requires_grad_()
        results.append(torch.autograd.grad(module(x)[0], x, several, is_grads_batched=True)[0])
    torch.testing.assert_close(*results, rtol=0, atol=FLOAT64_AGREEMENT)


@pytest.mark.parametrize("every", [None, 1, 8])
def test_a_slow_state_of_half_precision_is_not_rounded_between_pieces(every):
    layer = fastrnn.LSTM(4, 8, checkpoint=every)
    with torch.no_grad():
        layer.bias_ih_l0[8:16], layer.bias_ih_l0[:8], layer.bias_ih_l0[16:24] = 9.0, -4.0, 1.0
    layer = layer.bfloat16()
    x = torch.randn(1500, 3, 4).bfloat16()
    exact = copy.deepcopy(layer).double()(x.double())[1][1]
    cell = layer(x)[1][1]
    assert (cell.double() - exact).norm() < torch.finfo(torch.bfloat16).eps * exact.norm()


LONG = """
import torch, fastrnn
def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
torch.set_num_threads(1)
layer = fastrnn.LSTM(8, 64, checkpoint={every})
layer(torch.randn(40, 1, 8))[0].backward(torch.ones(40, 1, 64))  # compiles and imports
x, d_output = torch.randn({steps}, 1, 8, requires_grad=True), torch.ones({steps}, 1, 64)
before = kilobytes("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
layer(x)[0].backward(d_output)
print(kilobytes("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of a process's memory is read from /proc")
def test_a_hundred_thousand_steps():
    """What training takes beside the input and the output's gradient: the output, the input's gradient, one piece."""
    steps = 100_000

    def used(every):
        """Bytes; the least of three: what else goes on in the machine only adds to it."""
        command = [sys.executable, "-c", LONG.format(every=every, steps=steps)]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "FASTRNN_BACKEND": "numba"}
        peaks = []
        for _ in range(3):
            process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
            assert process.returncode == 0, process.stderr
            peaks.append(int(process.stdout) * 1024)
        return min(peaks)

    output, input, gates = (4 * steps * size for size in (64, 8, 4 * 64))
    in_pieces = used(500)
    assert in_pieces < output + 2 * input + (8 << 20)
    assert used(None) - in_pieces > gates
