"""``return_cells=True``: the LSTM's cell states of a loop over its steps, and gradients through them."""

import pytest
import torch
from helpers import (
    CPU_BACKENDS,
    FLOAT64_AGREEMENT,
    assert_within_rule,
    errors_against_float64,
    in_float64,
    make_pair,
    random_packed,
    random_state,
    rule_violation,
)
from test_resets import draw, draw_resets
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastrnn

FEATURES, HIDDEN, BATCH, STEPS = 3, 6, 5, 9
LENGTHS = torch.tensor([4, 9, 0, 1, 7])
backends = pytest.mark.parametrize("backend", (*CPU_BACKENDS, "triton", "torch"))
both = pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
names = pytest.mark.parametrize("name", ["lstm", "lstm_proj"])


def plain_loop(layer, input, hx, resets=None):
    """The specification: the last layer's output and cell states, every layer of torch.nn as a loop over its steps."""
    finals = []
    for number in range(layer.num_layers):
        outputs, all_cells = [], []
        for direction, suffix in enumerate(("", "_reverse")[: 2 if layer.bidirectional else 1]):
            roles = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            weight_ih, weight_hh, bias_ih, bias_hh = (getattr(layer, f"{role}_l{number}{suffix}") for role in roles)
            weight_hr = getattr(layer, f"weight_hr_l{number}{suffix}", None)
            place = number * (2 if layer.bidirectional else 1) + direction
            h, c = hx[0][place], hx[1][place]
            hiddens, cells = [None] * len(input), [None] * len(input)
            for t in reversed(range(len(input))) if direction else range(len(input)):
                if resets is not None and t + direction < len(input):
                    kept = ~resets[t + direction][:, None]
                    h, c = h * kept, c * kept
                i, f, g, o = (input[t] @ weight_ih.T + bias_ih + h @ weight_hh.T + bias_hh).chunk(4, -1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                h = h if weight_hr is None else h @ weight_hr.T
                hiddens[t], cells[t] = h, c
            outputs.append(torch.stack(hiddens))
            all_cells.append(torch.stack(cells))
            finals.append((h, c))
        input = torch.cat(outputs, -1)
    final = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
    return input, final, torch.cat(all_cells, -1)


def results_of(call, module, input, hx, only_cells=False):
    output, final, cells = call()
    loss = cells.sin().sum()
    if not only_cells:
        loss = loss + output.sin().sum() + sum(part.cos().sum() for part in final)
    gradients = torch.autograd.grad(loss, [input, *hx, *module.parameters()], allow_unused=only_cells)
    return [output, *final, cells, *(torch.zeros(()) if g is None else g for g in gradients)]


@backends
@pytest.mark.parametrize("only_cells", [False, True], ids=["all", "only-cells"])
@pytest.mark.parametrize("num_layers", [1, 2])
@both
@names
def test_is_the_plain_loop(name, bidirectional, num_layers, only_cells, backend):
    if name == "lstm_proj" and backend == "triton":
        pytest.skip("its kernels have no projections; it says so")
    ours, theirs, input, hx = draw(name, bidirectional=bidirectional, num_layers=num_layers)
    for resets in (None, draw_resets()):
        expected = results_of(lambda: plain_loop(theirs, input, hx, resets), theirs, input, hx, only_cells)  # noqa: B023
        with fastrnn.use_backend(backend):
            got = results_of(lambda: ours(input, hx, resets=resets, return_cells=True), ours, input, hx, only_cells)  # noqa: B023
        for mine, other in zip(got, expected, strict=True):
            assert_within_rule(mine, other, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@names
def test_rule_in_lower_precision(name, dtype):
    errors = []
    for seed in range(8):
        ours, theirs, input, hx = draw(name, dtype, seed, bidirectional=True)
        exact, wide = in_float64(theirs), in_float64(input).requires_grad_()
        wide_hx = tuple(part.requires_grad_() for part in in_float64(hx))
        reference = results_of(lambda: plain_loop(exact, wide, wide_hx), exact, wide, wide_hx)  # noqa: B023
        expected = results_of(lambda: plain_loop(theirs, input, hx), theirs, input, hx)  # noqa: B023
        got = results_of(lambda: ours(input, hx, return_cells=True), ours, input, hx)  # noqa: B023
        errors.append([errors_against_float64(*three) for three in zip(got, expected, reference, strict=True)])
    for draws in zip(*errors, strict=True):
        problem = rule_violation(list(draws))
        assert problem is None, problem


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [1, 2, 40])
def test_sizes_that_threads_share(batch, threads):
    ours, theirs = make_pair("LSTM", 20, 130, dtype=torch.float64)
    input, hx = torch.randn(30, batch, 20, dtype=torch.float64), random_state(theirs, batch, torch.float64, 1)
    input.requires_grad_()
    hx = tuple(part.requires_grad_() for part in hx)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = results_of(lambda: ours(input, hx, return_cells=True), ours, input, hx)
    finally:
        torch.set_num_threads(before)
    for mine, other in zip(got, results_of(lambda: plain_loop(theirs, input, hx), theirs, input, hx), strict=True):
        assert_within_rule(mine, other, other)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@both
@names
def test_layouts_packed_and_lengths(name, bidirectional, backend):
    ours, _, input, hx = draw(name, bidirectional=bidirectional, num_layers=2)
    input, width = input.detach(), HIDDEN * (2 if bidirectional else 1)

    def close(mine, other):
        torch.testing.assert_close(mine, other, rtol=0, atol=FLOAT64_AGREEMENT)

    with fastrnn.use_backend(backend), torch.no_grad():
        output, final, cells = ours(input, hx, return_cells=True)
        assert cells.shape == (STEPS, BATCH, width)
        assert torch.equal(output, ours(input, hx)[0])
        # the last layer's state after its last step is the last of the states
        assert torch.equal(cells[-1, :, :HIDDEN], final[1][-2 if bidirectional else -1])
        assert not bidirectional or torch.equal(cells[0, :, HIDDEN:], final[1][-1])
        ours.batch_first = True
        close(ours(input.transpose(0, 1), hx, return_cells=True)[2].transpose(0, 1), cells)
        ours.batch_first = False
        alone = ours(input[:, 2], tuple(part[:, 2] for part in hx), return_cells=True)[2]
        close(alone, cells[:, 2])

        packed = pack_padded_sequence(input, LENGTHS.clamp(min=1), enforce_sorted=False)
        output, _, cells = ours(packed, hx, return_cells=True)
        assert isinstance(cells, PackedSequence) and torch.equal(cells.batch_sizes, output.batch_sizes)
        padded, lengths = pad_packed_sequence(cells)
        assert torch.equal(lengths, LENGTHS.clamp(min=1))
        close(ours(input, hx, lengths=lengths, return_cells=True)[2], padded)
        for number, length in enumerate(LENGTHS.tolist()):
            cells = ours(input, hx, lengths=LENGTHS, return_cells=True)[2][:, number]
            assert cells[length:].abs().sum() == 0
            if length:
                own = tuple(part[:, number] for part in hx)
                close(cells[:length], ours(input[:length, number], own, return_cells=True)[2])


@pytest.mark.parametrize("with_lengths", [False, True], ids=["", "lengths"])
@names
def test_derivatives_transforms_and_checkpoints(name, with_lengths):
    ours, _, input, _ = draw(name, bidirectional=True)
    small = input.detach()[:4, :3]
    call = {"return_cells": True, **({"lengths": torch.tensor([2, 0, 4])} if with_lengths else {})}

    def both_of(x):
        output, _, cells = ours(x, **call)
        return output, cells

    def cells_of(x):
        return ours(x, **call)[2]

    for function in (both_of, cells_of):
        assert torch.autograd.gradcheck(function, small.clone().requires_grad_(), check_batched_grad=True)
        assert torch.autograd.gradgradcheck(function, small.clone().requires_grad_())
    tangent = torch.randn_like(small)
    _, forward = torch.func.jvp(cells_of, (small,), (tangent,))
    cotangent = torch.randn_like(forward)
    (backward,) = torch.func.vjp(cells_of, small)[1](cotangent)
    torch.testing.assert_close((forward * cotangent).sum(), (backward * tangent).sum())
    parameters = dict(ours.named_parameters())

    def loss(parameters, x):
        call = {"lengths": torch.tensor([3])} if with_lengths else {}
        output, _, cells = torch.func.functional_call(ours, parameters, (x[:, None],), {"return_cells": True, **call})
        return (output.sum(-1) * cells.sin().sum(-1)).sum()

    stacked = {key: torch.stack([value, value + 0.1, value - 0.2]) for key, value in parameters.items()}
    shared = torch.func.vmap(torch.func.grad(loss), (None, 1))(parameters, small)
    ensemble = torch.func.vmap(torch.func.grad(loss), (0, 1))(stacked, small)
    for number in range(3):
        own = {key: value[number] for key, value in stacked.items()}
        for together, weights in ((shared, parameters), (ensemble, own)):
            for key, gradient in torch.func.grad(loss)(weights, small[:, number]).items():
                torch.testing.assert_close(together[key][number], gradient, rtol=0, atol=FLOAT64_AGREEMENT)
    gradients = []
    for ours.checkpoint in (None, 1, 3):
        output, final, cells = ours(input, **({**call, "lengths": LENGTHS} if with_lengths else call))
        loss_of_all = output.cos().sum() + final[1].sin().sum() + cells.sin().sum()
        gradients.append(torch.autograd.grad(loss_of_all, [input, *ours.parameters()], create_graph=True))
        gradients.append(torch.autograd.grad(sum(g.square().sum() for g in gradients[-1]), list(ours.parameters())))
    for other in (gradients[2], gradients[4], gradients[3], gradients[5]):
        expected = gradients[0] if len(other) == len(gradients[0]) else gradients[1]
        for mine, theirs in zip(other, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


def test_checkpoints_in_first_order_and_half_precision():
    for dtype in (torch.float64, torch.bfloat16):
        ours, _, input, hx = draw("lstm", dtype, bidirectional=True)
        everything = []
        for ours.checkpoint in (None, 1, 4):
            everything.append(results_of(lambda: ours(input, hx, return_cells=True), ours, input, hx))  # noqa: B023
        for other in everything[1:]:
            for mine, expected in zip(other, everything[0], strict=True):
                tolerance = FLOAT64_AGREEMENT if dtype == torch.float64 else 2e-2 * expected.abs().max().item()
                torch.testing.assert_close(mine, expected, rtol=0, atol=tolerance)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_compile_export_and_traces():
    ours, _, input, hx = draw("lstm", bidirectional=True)
    expected = results_of(lambda: ours(input, hx, return_cells=True), ours, input, hx)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    got = results_of(lambda: compiled(input, hx, return_cells=True), ours, input, hx)
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=FLOAT64_AGREEMENT)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = ours

        def forward(self, x):
            return self.layer(x, return_cells=True)[2]

    input = input.detach()
    expected = Model()(input)
    program = torch.export.export(Model(), (input,)).module()
    (gradient,) = torch.autograd.grad(Model()(input).sin().sum(), ours.weight_hh_l0)
    weight = dict(program.named_parameters())["layer.weight_hh_l0"]
    torch.testing.assert_close(program(input), expected, rtol=0, atol=FLOAT64_AGREEMENT)
    (of_program,) = torch.autograd.grad(program(input).sin().sum(), weight)
    torch.testing.assert_close(of_program, gradient, rtol=0, atol=FLOAT64_AGREEMENT)
    with torch.no_grad():
        traced = torch.jit.trace(Model(), (input,), check_trace=False)
        torch.testing.assert_close(traced(input + 1), Model()(input + 1), rtol=0, atol=FLOAT64_AGREEMENT)
    symbolic = torch.fx.symbolic_trace(Model())
    torch.testing.assert_close(symbolic(input), expected, rtol=0, atol=FLOAT64_AGREEMENT)


@pytest.mark.parametrize("kind", ["RNN", "GRU"])
def test_only_an_lstm_has_cells(kind):
    layer = getattr(fastrnn, kind)(FEATURES, HIDDEN)
    with pytest.raises(TypeError, match=f"return_cells is for the LSTM: {kind} has no cell state"):
        layer(torch.randn(STEPS, BATCH, FEATURES), return_cells=True)
    packed = random_packed(BATCH, STEPS, FEATURES, torch.float32, 0)
    with pytest.raises(TypeError, match="return_cells is for the LSTM"):
        layer(packed, return_cells=True)
    with pytest.raises(ValueError, match="this needs an input"):
        fastrnn.LSTM(FEATURES, HIDDEN)(torch.randn(STEPS, 0, FEATURES), return_cells=True)
