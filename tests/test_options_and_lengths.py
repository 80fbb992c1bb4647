"""Options and ``lengths=`` together, and where tracers, transforms and autocast look on."""

from functools import partial

import pytest
import torch
from helpers import assert_within_rule
from torch.utils.checkpoint import checkpoint

import fastrnn

FEATURES, HIDDEN, BATCH, STEPS = 3, 4, 3, 5
OPTIONS = {
    "peephole": ("LSTM", {"peephole": True}),
    "layer_norm": ("LSTM", {"layer_norm": True, "num_layers": 2, "bidirectional": True, "residual": True}),
    "zoneout": ("GRU", {"zoneout": 0.2}),
    "reset_before": ("GRU", {"reset_after": False, "bidirectional": True}),
    "periods": ("RNN", {"periods": (1, 2)}),
}
options = pytest.mark.parametrize("name", OPTIONS)


def make(name, **more):
    torch.manual_seed(0)
    class_name, chosen = OPTIONS[name]
    return getattr(fastrnn, class_name)(FEATURES, HIDDEN, dtype=torch.float64, **chosen, **more)


def draw(seed=0):
    generator = torch.Generator().manual_seed(seed)
    input = torch.randn(STEPS, BATCH, FEATURES, generator=generator, dtype=torch.float64)
    return input, torch.rand(STEPS, BATCH, generator=generator) < 0.4


class ByLengths(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, input, lengths):
        return self.layer(input, lengths=lengths)[0]


@options
@pytest.mark.parametrize("with_resets", [False, True], ids=["", "resets"])
def test_lengths_are_those_sequences_one_by_one(name, with_resets):
    layer, (input, resets) = make(name).eval(), draw()
    lengths = torch.tensor([5, 0, 3])
    more = {"resets": resets} if with_resets else {}
    output, final = layer(input, lengths=lengths, **more)
    for b, length in enumerate(lengths.tolist()):
        assert not output[length:, b].any()
        if length:
            own = {"resets": resets[:length, b]} if with_resets else {}
            expected, expected_final = layer(input[:length, b], **own)
            assert_within_rule(output[:length, b], expected, expected)
            h, expected_h = (part[0] if isinstance(part, tuple) else part for part in (final, expected_final))
            assert_within_rule(h[:, b], expected_h, expected_h)


@options
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_compiled_and_traced_programs_take_other_lengths(name):
    layer, (input, _) = make(name).eval(), draw()
    first, second = torch.tensor([5, 2, 1]), torch.tensor([3, 3, 4])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    traced = torch.jit.trace(ByLengths(layer), (input, first), check_trace=False)
    for lengths in (first, second):
        expected = layer(input, lengths=lengths)[0]
        assert_within_rule(compiled(input, lengths=lengths)[0], expected, expected)
        assert_within_rule(traced(input, lengths), expected, expected)


@options
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_of_packed_input_is_refused(name):
    """It would hold the batch sizes of its example."""
    layer, (input, _) = make(name).eval(), draw()

    class Packs(ByLengths):
        def forward(self, input, lengths):
            packed = torch.nn.utils.rnn.pack_padded_sequence(input, lengths, enforce_sorted=False)
            return self.layer(packed)[0].data

    with pytest.raises(RuntimeError, match="lengths="):
        torch.jit.trace(Packs(layer), (input, torch.tensor([5, 2, 1])), check_trace=False)


def test_clocks_under_vmap_with_resets_of_their_own():
    layer, (input, resets) = make("periods"), draw()

    class Resets(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, input, resets):
            return self.layer(input, resets=resets)

    def loss(result):
        return result[0].square().sum()

    gradients = fastrnn.per_sample_gradients(Resets(), loss, (input, resets), batch_dim=1)
    for b in range(BATCH):
        one = loss(layer(input[:, b : b + 1], resets=resets[:, b : b + 1]))
        expected = torch.autograd.grad(one, layer.weight_hh_l0)[0]
        assert_within_rule(gradients["layer.weight_hh_l0"][b], expected, expected)


@options
def test_a_default_device_is_not_asked(name):
    layer, (input, resets) = make(name).eval(), draw()
    expected = layer(input, resets=resets)[0]
    with torch.device("meta"):
        assert torch.equal(layer(input, resets=resets)[0], expected)


# one layer: between two lies torch's own product
@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "layer_norm"])
def test_gradients_inside_autocast_are_those_outside(name):
    layer, (input, _) = make(name).float().eval(), draw()
    total = layer(input.float())[0].square().sum()
    outside = torch.autograd.grad(total, layer.weight_hh_l0, retain_graph=True)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad(total, layer.weight_hh_l0)[0]
    assert torch.equal(inside, outside)


@options
def test_gradients_inside_a_checkpoint(name):
    layer, (input, resets) = make(name).eval(), draw()
    results = []
    for run in (layer, partial(checkpoint, layer, use_reentrant=False)):
        total = run(input, resets=resets)[0].square().sum()
        results.append(torch.autograd.grad(total, list(layer.parameters())))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


def test_keras_weights_do_not_go_to_what_is_computed():
    layer = torch.nn.utils.parametrizations.weight_norm(fastrnn.LSTM(FEATURES, HIDDEN), "weight_hh_l0")
    weights = [torch.zeros(FEATURES, 4 * HIDDEN), torch.zeros(HIDDEN, 4 * HIDDEN), torch.zeros(4 * HIDDEN)]
    with pytest.raises(ValueError, match="weight_hh_l0 are no parameters"):
        fastrnn.load_keras_weights(layer, weights)
