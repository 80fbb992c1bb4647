"""``resets=``: the numbers of a loop over torch's cells that multiplies the state by 1 - done, on every backend."""

import pytest
import torch
from cases import LAYERS, layers
from helpers import (
    CPU_BACKENDS,
    FLOAT64_AGREEMENT,
    assert_within_rule,
    errors_against_float64,
    in_float64,
    make_pair,
    random_state,
    rule_violation,
)
from torch import nn

import fastrnn

FEATURES, HIDDEN, BATCH, STEPS = 3, 6, 5, 9
BACKENDS = (*CPU_BACKENDS, "triton", "torch")
backends = pytest.mark.parametrize("backend", BACKENDS)


def draw_resets(seed=0, steps=STEPS, batch=BATCH, share=0.3):
    resets = torch.rand(steps, batch, generator=torch.Generator().manual_seed(seed)) < share
    resets[0, 0] = resets[-1, 1] = True  # the first step of either direction
    return resets


def plain_loop(layer, input, hx, resets):
    """The specification: one layer of torch.nn as a Python loop over its steps, each direction by itself.

    An episode begins at every reset, in both directions: none of its numbers depend on another episode's.
    """
    outputs, finals = [], []
    for direction in range(2 if layer.bidirectional else 1):
        suffix = "_reverse" if direction else ""
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        weight_ih, weight_hh, bias_ih, bias_hh = (getattr(layer, name + suffix) for name in names)
        weight_hr = getattr(layer, "weight_hr_l0" + suffix, None)
        h, *c = (part[direction] for part in (hx if isinstance(hx, tuple) else (hx,)))
        results = [None] * len(input)
        for t in reversed(range(len(input))) if direction else range(len(input)):
            if direction:
                done = resets[t + 1] if t + 1 < len(input) else torch.zeros_like(resets[0])
            else:
                done = resets[t]
            h, c = h * ~done[:, None], [part * ~done[:, None] for part in c]
            gates_x = input[t] @ weight_ih.T + bias_ih
            gates_h = h @ weight_hh.T + bias_hh
            if layer.mode == "LSTM":
                i, f, g, o = (gates_x + gates_h).chunk(4, -1)
                c = [f.sigmoid() * c[0] + i.sigmoid() * g.tanh()]
                h = o.sigmoid() * c[0].tanh()
                h = h if weight_hr is None else h @ weight_hr.T
            elif layer.mode == "GRU":
                (r_x, z_x, n_x), (r_h, z_h, n_h) = gates_x.chunk(3, -1), gates_h.chunk(3, -1)
                z = (z_x + z_h).sigmoid()
                h = (1 - z) * (n_x + (r_x + r_h).sigmoid() * n_h).tanh() + z * h
            else:
                h = (gates_x + gates_h).tanh() if layer.mode == "RNN_TANH" else (gates_x + gates_h).relu()
            results[t] = h
        outputs.append(torch.stack(results))
        finals.append((h, *c))
    return torch.cat(outputs, -1), tuple(torch.stack(parts) for parts in zip(*finals, strict=True))


def results_of(call, module, input, hx):
    """Output, final state and the gradients of everything, in one list."""
    leaves = [input, *(hx if isinstance(hx, tuple) else (hx,)), *module.parameters()]
    output, final = call()
    final = final if isinstance(final, tuple) else (final,)
    loss = output.sin().sum() + sum(part.cos().sum() for part in final)
    return [output, *final, *torch.autograd.grad(loss, leaves)]


def draw(name, dtype=torch.float64, seed=0, **options):
    class_name, variant = LAYERS[name]
    ours, theirs = make_pair(class_name, FEATURES, HIDDEN, seed=seed, dtype=dtype, **variant, **options)
    generator = torch.Generator().manual_seed(seed)
    input = torch.randn(STEPS, BATCH, FEATURES, generator=generator).to(dtype).requires_grad_()
    hx = random_state(theirs, BATCH, dtype, seed + 1)
    hx = tuple(part.requires_grad_() for part in hx) if isinstance(hx, tuple) else hx.requires_grad_()
    return ours, theirs, input, hx


def skip_projection(name, backend):
    if name == "lstm_proj" and backend == "triton":
        pytest.skip("its kernels have no projections; it says so")


@backends
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
@layers
def test_is_the_plain_loop(name, bidirectional, backend):
    skip_projection(name, backend)
    ours, theirs, input, hx = draw(name, bidirectional=bidirectional)
    resets = draw_resets()
    expected = results_of(lambda: plain_loop(theirs, input, hx, resets), theirs, input, hx)
    with fastrnn.use_backend(backend):
        got = results_of(lambda: ours(input, hx, resets=resets), ours, input, hx)
    for mine, other in zip(got, expected, strict=True):
        assert_within_rule(mine, other, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@layers
def test_rule_in_lower_precision(name, dtype):
    """Against the loop in float64, on average over some draws; torch's own error is that of the loop in this dtype."""
    errors = []
    # rounding turns a gradient of relu on or off now and then: more draws tell how often
    for seed in range(160 if name == "rnn_relu" else 8):
        ours, theirs, input, hx = draw(name, dtype, seed, bidirectional=True)
        resets, exact = draw_resets(seed), in_float64(theirs)
        wide, wide_hx = in_float64(input).requires_grad_(), in_float64(hx)
        for part in wide_hx if isinstance(wide_hx, tuple) else (wide_hx,):
            part.requires_grad_()
        reference = results_of(lambda: plain_loop(exact, wide, wide_hx, resets), exact, wide, wide_hx)  # noqa: B023
        expected = results_of(lambda: plain_loop(theirs, input, hx, resets), theirs, input, hx)  # noqa: B023
        got = results_of(lambda: ours(input, hx, resets=resets), ours, input, hx)  # noqa: B023
        errors.append([errors_against_float64(*three) for three in zip(got, expected, reference, strict=True)])
    for draws in zip(*errors, strict=True):
        problem = rule_violation(list(draws))
        assert problem is None, problem


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [1, 2, 40])
@layers
def test_sizes_that_threads_share(name, batch, threads):
    class_name, variant = LAYERS[name]
    variant = {**variant, "proj_size": 40} if name == "lstm_proj" else variant
    ours, theirs = make_pair(class_name, 20, 130, dtype=torch.float64, **variant)
    input = torch.randn(30, batch, 20, dtype=torch.float64)
    hx, resets = random_state(theirs, batch, torch.float64, 1), draw_resets(0, 30, max(batch, 2))[:, :batch]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = []
        for call in (lambda: ours(input, hx, resets=resets), lambda: plain_loop(theirs, input, hx, resets)):
            module = ours if not results else theirs
            output, _ = call()
            results.append([output, *torch.autograd.grad(output.sin().sum(), list(module.parameters()))])
    finally:
        torch.set_num_threads(before)
    for mine, other in zip(*results, strict=True):
        assert_within_rule(mine, other, other)


@layers
def test_layers_layouts_and_checkpoints(name):
    class_name, variant = LAYERS[name]
    layer = getattr(fastrnn, class_name)(FEATURES, HIDDEN, 2, dtype=torch.float64, bidirectional=True, **variant)
    first, second = draw_resets(), torch.zeros(STEPS, BATCH, dtype=torch.bool)
    input = torch.randn(STEPS, BATCH, FEATURES, dtype=torch.float64)
    with torch.no_grad():
        expected = layer(input, resets=first)[0]
        layer.batch_first = True
        assert torch.equal(layer(input.transpose(0, 1), resets=first.T)[0].transpose(0, 1), expected)
        layer.batch_first = False
        torch.testing.assert_close(
            layer(input[:, 2], resets=first[:, 2])[0], expected[:, 2], rtol=0, atol=FLOAT64_AGREEMENT
        )
        torch.testing.assert_close(layer(input, resets=second)[0], layer(input)[0], rtol=0, atol=FLOAT64_AGREEMENT)
    gradients = []
    for layer.checkpoint in (None, 2, 4):
        output, _ = layer(input, resets=first)
        gradients.append(torch.autograd.grad(output.sin().sum(), list(layer.parameters())))
    for other in gradients[1:]:
        for mine, expected in zip(other, gradients[0], strict=True):
            torch.testing.assert_close(mine, expected, rtol=0, atol=FLOAT64_AGREEMENT)


@layers
def test_no_gradient_crosses(name):
    ours, _, input, _ = draw(name, bidirectional=True, num_layers=2)
    resets = torch.zeros(STEPS, BATCH, dtype=torch.bool)
    resets[4] = True
    output, _ = ours(input, resets=resets)
    (before,) = torch.autograd.grad(output[4:].sum(), input, retain_graph=True)
    (after,) = torch.autograd.grad(output[:4].sum(), input)
    assert before[:4].abs().max() == after[4:].abs().max() == 0
    assert before[4:].abs().max() > 0 < after[:4].abs().max()


@layers
def test_derivatives_and_transforms(name):
    ours, _, input, _ = draw(name, bidirectional=True)
    small, resets = input.detach()[:4, :2], draw_resets()[:4, :2]
    if name != "rnn_relu":
        assert torch.autograd.gradcheck(lambda x: ours(x, resets=resets)[0], small.clone().requires_grad_())
        assert torch.autograd.gradgradcheck(lambda x: ours(x, resets=resets)[0], small.clone().requires_grad_())
    parameters = dict(ours.named_parameters())

    def loss(parameters, x, resets):
        output = torch.func.functional_call(ours, parameters, (x[:, None],), {"resets": resets[:, None]})[0]
        return output.sin().sum()

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1, 1))(parameters, small, resets)
    for number in range(2):
        alone = torch.func.grad(loss)(parameters, small[:, number], resets[:, number])
        for key, gradient in alone.items():
            torch.testing.assert_close(together[key][number], gradient, rtol=0, atol=FLOAT64_AGREEMENT)
    tangent = torch.ones_like(small)
    _, forward = torch.func.jvp(lambda x: ours(x, resets=resets)[0], (small,), (tangent,))
    torch.testing.assert_close(forward.sum(), torch.func.grad(lambda x: ours(x, resets=resets)[0].sum())(small).sum())


def test_compile_export_and_symbolic_trace():
    ours, _, input, _ = draw("lstm", bidirectional=True)
    input, resets = input.detach(), draw_resets()
    expected = ours(input, resets=resets)[0]
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input, resets=resets)[0], expected, rtol=0, atol=FLOAT64_AGREEMENT)
    (gradient,) = torch.autograd.grad(compiled(input, resets=resets)[0].sum(), [ours.weight_hh_l0])
    (eager,) = torch.autograd.grad(ours(input, resets=resets)[0].sum(), [ours.weight_hh_l0])
    torch.testing.assert_close(gradient, eager, rtol=0, atol=FLOAT64_AGREEMENT)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = ours

        def forward(self, x, resets):
            return self.layer(x, resets=resets)[0]

    program = torch.export.export(Model(), (input, resets))
    torch.testing.assert_close(program.module()(input, resets), expected, rtol=0, atol=FLOAT64_AGREEMENT)
    traced = torch.fx.symbolic_trace(Model())
    torch.testing.assert_close(traced(input, resets), expected, rtol=0, atol=FLOAT64_AGREEMENT)


def test_bad_resets():
    layer, x, resets = fastrnn.GRU(FEATURES, HIDDEN), torch.randn(STEPS, BATCH, FEATURES), draw_resets()
    with pytest.raises(ValueError, match=r"resets should have the shape \(9, 5\)"):
        layer(x, resets=resets.T)
    with pytest.raises(TypeError, match=r"torch.bool, got torch.float32: try resets.bool\(\)"):
        layer(x, resets=resets.float())
    with pytest.raises(TypeError, match="got list"):
        layer(x, resets=resets.tolist())
    with pytest.raises(ValueError, match="got a PackedSequence"):
        layer(nn.utils.rnn.pack_sequence([x[:, 0]]), resets=resets)
    with pytest.raises(ValueError, match="device"):
        layer(x, resets=resets.to("meta"))
    with pytest.raises(TypeError):
        layer(x, None, resets)
    with pytest.raises(RuntimeError, match=r"input.size\(-1\)"):
        layer(x[..., :2], resets=resets)
