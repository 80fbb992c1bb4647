"""``lengths=``: the numbers of pack, layer, unpack; of a loop over the steps of each sequence by itself with resets."""

import pytest
import torch
from cases import LAYERS, layers
from helpers import CPU_BACKENDS, FLOAT64_AGREEMENT, assert_within_rule, make_pair, random_state
from test_resets import draw, draw_resets, plain_loop, results_of, skip_projection
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn

FEATURES, HIDDEN, BATCH, STEPS = 3, 6, 5, 9
LENGTHS = torch.tensor([4, 9, 0, 1, 7])
backends = pytest.mark.parametrize("backend", (*CPU_BACKENDS, "triton", "torch"))


def each_alone(layer, input, hx, lengths, resets=None):
    """The specification: every sequence by itself, cut to its length, as a loop over its steps."""
    is_lstm = isinstance(hx, tuple)
    outputs, finals = [], []
    for number, length in enumerate(lengths.tolist()):
        own = tuple(part[:, number : number + 1] for part in (hx if is_lstm else (hx,)))
        output = input.new_zeros(0, 1, (2 if layer.bidirectional else 1) * (getattr(layer, "proj_size", 0) or HIDDEN))
        if length:
            done = torch.zeros(length, 1, dtype=torch.bool) if resets is None else resets[:length, number, None]
            output, own = plain_loop(layer, input[:length, number, None], own if is_lstm else own[0], done)
        outputs.append(torch.cat([output, output.new_zeros(len(input) - length, 1, output.shape[-1])]))
        finals.append(own)
    return torch.cat(outputs, 1), tuple(torch.cat(parts, 1) for parts in zip(*finals, strict=True))


@backends
@pytest.mark.parametrize("with_resets", [False, True], ids=["", "resets"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
@layers
def test_is_each_sequence_alone(name, bidirectional, with_resets, backend):
    skip_projection(name, backend)
    ours, theirs, input, hx = draw(name, bidirectional=bidirectional)
    resets = draw_resets() if with_resets else None
    expected = results_of(lambda: each_alone(theirs, input, hx, LENGTHS, resets), theirs, input, hx)
    with fastrnn.use_backend(backend):
        got = results_of(lambda: ours(input, hx, resets=resets, lengths=LENGTHS), ours, input, hx)
    for mine, other in zip(got, expected, strict=True):
        assert_within_rule(mine, other, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
@layers
def test_is_pack_layer_unpack(name, bidirectional, dtype):
    """To the bit: several layers, dropout between them from the same seed, batch_first, no hx."""
    class_name, variant = LAYERS[name]
    options = {"bidirectional": bidirectional, "num_layers": 2, "dropout": 0.5, "batch_first": True}
    layer = getattr(fastrnn, class_name)(FEATURES, HIDDEN, dtype=dtype, **variant, **options)
    lengths = LENGTHS.clamp(min=1)
    results = []
    for way in ("lengths", "packed"):
        input = torch.randn(BATCH, STEPS, FEATURES, generator=torch.Generator().manual_seed(0)).to(dtype)
        input.requires_grad_()
        torch.manual_seed(1)
        if way == "lengths":
            output, final = layer(input, lengths=lengths)
        else:
            packed = pack_padded_sequence(input, lengths, batch_first=True, enforce_sorted=False)
            output, final = layer(packed)
            output, _ = pad_packed_sequence(output, batch_first=True)
        final = final if isinstance(final, tuple) else (final,)
        loss = output.sin().sum() + sum(part.cos().sum() for part in final)
        results.append([output, *final, *torch.autograd.grad(loss, [input, *layer.parameters()])])
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [1, 2, 40])
@layers
def test_sizes_that_threads_share(name, batch, threads):
    class_name, variant = LAYERS[name]
    variant = {**variant, "proj_size": 40} if name == "lstm_proj" else variant
    ours, theirs = make_pair(class_name, 20, 130, dtype=torch.float64, bidirectional=True, **variant)
    input = torch.randn(30, batch, 20, dtype=torch.float64)
    hx, resets = random_state(theirs, batch, torch.float64, 1), draw_resets(0, 30, max(batch, 2), 0.1)[:, :batch]
    lengths = torch.randint(0, 31, (batch,), generator=torch.Generator().manual_seed(batch))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = []
        for backend in ("numba", "reference"):
            with fastrnn.use_backend(backend):
                output, final = ours(input, hx, resets=resets, lengths=lengths)
                final = final if isinstance(final, tuple) else (final,)
                gradients = torch.autograd.grad(output.sin().sum(), list(ours.parameters()))
            results.append([output, *final, *gradients])
    finally:
        torch.set_num_threads(before)
    for mine, other in zip(*results, strict=True):
        assert_within_rule(mine, other, other)


@pytest.mark.parametrize("backend", ["numba", "torch"])
@layers
def test_what_stands_in_the_padding_is_not_looked_at(name, backend):
    ours, _, input, hx = draw(name, bidirectional=True, num_layers=2)
    padding = (torch.arange(STEPS)[:, None] >= LENGTHS)[:, :, None]
    results = []
    with fastrnn.use_backend(backend):
        for number in (0.0, float("nan")):
            filled = input.detach().masked_fill(padding, number).requires_grad_()
            results.append(results_of(lambda: ours(filled, hx, lengths=LENGTHS), ours, filled, hx))  # noqa: B023
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine, other)
    assert results[0][0].masked_select(padding).abs().max() == 0
    final = results[0][1]
    assert torch.equal(final[:, 2], (hx[0] if isinstance(hx, tuple) else hx)[:, 2])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@layers
def test_extremes_layouts_and_checkpoints(name, backend):
    class_name, variant = LAYERS[name]
    layer = getattr(fastrnn, class_name)(FEATURES, HIDDEN, 2, dtype=torch.float64, bidirectional=True, **variant)
    input, hx = torch.randn(STEPS, BATCH, FEATURES, dtype=torch.float64), random_state(layer, BATCH, torch.float64, 1)

    def close(mine, other):
        torch.testing.assert_close(mine, other, rtol=0, atol=FLOAT64_AGREEMENT)

    with fastrnn.use_backend(backend), torch.no_grad():
        for (mine, final), (other, expected) in (
            (layer(input, hx, lengths=torch.full((BATCH,), STEPS)), layer(input, hx)),
            (layer(input, hx, lengths=torch.full((BATCH,), 5)), layer(input[:5], hx)),
        ):
            close(mine[: len(other)], other)
            close(final, expected)
            assert mine[len(other) :].abs().sum() == 0
        output, final = layer(input, hx, lengths=torch.zeros(BATCH, dtype=torch.int32))
        assert output.abs().max() == 0
        close(final, hx)
        expected = layer(input, lengths=LENGTHS)[0]
        layer.batch_first = True
        assert torch.equal(layer(input.transpose(0, 1), lengths=LENGTHS.to(torch.uint8))[0].transpose(0, 1), expected)
        layer.batch_first = False
        output, final = layer(input[:, 4], lengths=LENGTHS[4])
        close(output, expected[:, 4])
        assert (final[0] if isinstance(final, tuple) else final).dim() == 2
    gradients = []
    resets = draw_resets()
    for layer.checkpoint in (None, 2, 4):
        with fastrnn.use_backend(backend):
            output, _ = layer(input, hx, lengths=LENGTHS, resets=resets)
        gradients.append(torch.autograd.grad(output.sin().sum(), list(layer.parameters())))
    for other in gradients[1:]:
        for mine, expected in zip(other, gradients[0], strict=True):
            close(mine, expected)


@pytest.mark.parametrize("backend", ["numba", "torch"])
@layers
def test_derivatives_and_transforms(name, backend):
    ours, _, input, _ = draw(name, bidirectional=True)
    small, lengths = input.detach()[:4, :3], torch.tensor([2, 0, 3])  # the last step is nobody's

    def output_of(x):
        return ours(x, lengths=lengths)[0]

    with fastrnn.use_backend(backend):
        if name != "rnn_relu":
            assert torch.autograd.gradcheck(output_of, small.clone().requires_grad_())
            assert torch.autograd.gradgradcheck(output_of, small.clone().requires_grad_())
        tangent = torch.randn_like(small)
        _, forward = torch.func.jvp(output_of, (small,), (tangent,))
        cotangent = torch.randn_like(forward)
        (backward,) = torch.func.vjp(output_of, small)[1](cotangent)
        torch.testing.assert_close((forward * cotangent).sum(), (backward * tangent).sum())

        parameters = dict(ours.named_parameters())

        def loss(parameters, x, lengths):
            output = torch.func.functional_call(ours, parameters, (x[:, None],), {"lengths": lengths[None]})[0]
            return output.sin().sum()

        # the lengths differ from example to example, or are the same for all
        for own in (lengths, torch.tensor(3)):
            in_dims = (None, 1, 0 if own.dim() else None)
            together = torch.func.vmap(torch.func.grad(loss), in_dims)(parameters, small, own)
            for number in range(3):
                alone = torch.func.grad(loss)(parameters, small[:, number], own[number] if own.dim() else own)
                for key, gradient in alone.items():
                    torch.testing.assert_close(together[key][number], gradient, rtol=0, atol=FLOAT64_AGREEMENT)
        with pytest.raises(ValueError, match=r"between 0 and the input's 4 time steps, got \[5\]"):
            torch.func.vmap(torch.func.grad(loss), (None, 1, 0))(parameters, small, torch.tensor([2, 5, 4]))


class Model(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, lengths, resets=None):
        return self.layer(x, lengths=lengths, resets=resets)


@pytest.mark.parametrize(("name", "backend"), [("gru", None), ("lstm", None), ("gru", "torch")])
def test_compile(name, backend):
    layers = 1 if backend else 2  # plain operations are unrolled over time, and take a while to compile
    ours, _, input, hx = draw(name, bidirectional=True, num_layers=layers)
    parameters, resets = list(ours.parameters()), draw_resets()
    torch._dynamo.reset()
    model = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)

    def results(module, lengths):
        output, final = module(input, hx, lengths=lengths, resets=resets)
        final = final if isinstance(final, tuple) else (final,)
        loss = output.sin().sum() + sum(part.sin().sum() for part in final)
        return [output, *final, *torch.autograd.grad(loss, [input, *parameters])]

    for lengths in (LENGTHS, torch.tensor([0, 0, 3, 2, 9]), torch.zeros(5, dtype=torch.long)):
        expected = results(ours, lengths)
        if backend:
            with fastrnn.use_backend(backend):
                got = results(model, lengths)
        else:
            got = results(model, lengths)
        for mine, other in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=FLOAT64_AGREEMENT)
    with pytest.raises(RuntimeError, match="between 0 and"):
        results(model, LENGTHS + 1)


def test_inductor():
    ours, _, input, _ = draw("lstm", bidirectional=True)
    torch._dynamo.reset()
    expected, got = (module(input, lengths=LENGTHS)[0] for module in (ours, torch.compile(ours, fullgraph=True)))
    torch.testing.assert_close(got, expected, rtol=0, atol=FLOAT64_AGREEMENT)
    gradients = [torch.autograd.grad(output.sin().sum(), list(ours.parameters())) for output in (expected, got)]
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=FLOAT64_AGREEMENT)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_export_and_traces():
    ours, _, input, _ = draw("lstm", bidirectional=True)
    model, input = Model(ours), input.detach()
    expected = model(input, LENGTHS)[0]
    program = torch.export.export(model, (input, LENGTHS), dynamic_shapes=({0: torch.export.Dim.AUTO}, None))
    torch.testing.assert_close(program.module()(input, LENGTHS)[0], expected, rtol=0, atol=FLOAT64_AGREEMENT)
    short = LENGTHS.clamp(max=6)
    torch.testing.assert_close(program.module()(input[:6], short)[0], model(input[:6], short)[0])
    symbolic = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(symbolic(input, LENGTHS)[0], expected, rtol=0, atol=FLOAT64_AGREEMENT)
    with torch.no_grad():
        traced = torch.jit.trace(model, (input, LENGTHS), check_trace=False)
    torch.testing.assert_close(traced(input, short.flip(0))[0], model(input, short.flip(0))[0])


@layers
def test_no_number_is_looked_at_on_another_device(name):
    """The way of a GPU, on which no call may wait: tensors of the device meta have no numbers, reading one fails."""
    class_name, variant = LAYERS[name]
    layer = getattr(fastrnn, class_name)(FEATURES, HIDDEN, 2, bidirectional=True, device="meta", **variant)
    input = torch.empty(STEPS, BATCH, FEATURES, device="meta", requires_grad=True)
    resets = torch.empty(STEPS, BATCH, device="meta") > 0
    width = 2 * (getattr(layer, "proj_size", 0) or HIDDEN)
    for lengths in (torch.empty(BATCH, dtype=torch.int32, device="meta"), LENGTHS):
        output, _ = layer(input, lengths=lengths, resets=resets)
        assert output.shape == (STEPS, BATCH, width)
        output.sum().backward()
        assert input.grad.shape == input.shape


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_bad_lengths(backend):
    layer, x = fastrnn.GRU(FEATURES, HIDDEN), torch.randn(STEPS, BATCH, FEATURES)
    with fastrnn.use_backend(backend):
        with pytest.raises(ValueError, match=r"between 0 and the input's 9 time steps, got \[10\]"):
            layer(x, lengths=torch.tensor([4, 10, 0, 1, 7]))
        with pytest.raises(ValueError, match=r"between 0 and the input's 9 time steps, got \[-1, -3\]"):
            layer(x, lengths=torch.tensor([4, -1, 0, -3, 7]))
        with pytest.raises(
            ValueError, match=r"lengths should have the shape \(5,\), one for each sequence, got \(9,\)"
        ):
            layer(x, lengths=torch.ones(9, dtype=torch.long))
        with pytest.raises(ValueError, match=r"the shape \(\), for a single sequence, got \(1,\)"):
            layer(x[:, 0], lengths=torch.ones(1, dtype=torch.long))
        with pytest.raises(TypeError, match=r"whole numbers, got torch.float32: try torch.as_tensor\(lengths\).long"):
            layer(x, lengths=LENGTHS.float())
        with pytest.raises(TypeError, match="got list"):
            layer(x, lengths=LENGTHS.tolist())
        with pytest.raises(TypeError, match=r"got torch.bool: of a mask \(T, B\) try mask.sum\(0\)"):
            layer(x, lengths=LENGTHS.bool())
        with pytest.raises(ValueError, match="got a PackedSequence, which has its own"):
            layer(nn.utils.rnn.pack_sequence([x[:, 0]]), lengths=torch.tensor([9]))
        with pytest.raises(ValueError, match="device meta and hold no numbers"):
            layer(x, lengths=LENGTHS.to("meta"))
        with pytest.raises(TypeError):
            layer(x, None, None, LENGTHS)
        with pytest.raises(RuntimeError, match=r"input.size\(-1\)"):
            layer(x[..., :2], lengths=LENGTHS)
        with pytest.raises(ValueError, match="this needs an input"):
            layer(x[:, :0], lengths=LENGTHS[:0])
