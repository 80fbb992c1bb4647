"""``fastrnn.per_sample_gradients``: the numbers of a loop over batches of one, in one call."""

import pytest
import torch
from cases import LAYERS, layers
from helpers import FLOAT64_AGREEMENT, random_packed
from torch import nn

import fastrnn

FEATURES, HIDDEN, BATCH, STEPS = 3, 4, 5, 6


def loop(module, loss, inputs, *targets, dims):
    """The specification: a backward pass for every sample."""
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    parameters = [module.get_parameter(name) for name in names]
    gradients = []
    for number in range(BATCH):
        one = [tensor.narrow(dim, number, 1) for tensor, dim in zip((*inputs, *targets), dims, strict=True)]
        value = loss(module(*one[: len(inputs)]), *one[len(inputs) :])
        gradients.append(torch.autograd.grad(value, parameters))
    return {name: torch.stack(parts) for name, parts in zip(names, zip(*gradients, strict=True), strict=True)}


def assert_same(mine, other):
    assert list(mine) == list(other)
    for name, gradient in other.items():
        torch.testing.assert_close(mine[name], gradient, rtol=0, atol=FLOAT64_AGREEMENT)


def squares(result, target):
    output, _ = result
    return (output - target).square().sum()


@pytest.mark.parametrize("batch_first", [False, True])
@layers
def test_layers(name, batch_first):
    class_name, variant = LAYERS[name]
    layer = getattr(fastrnn, class_name)(
        FEATURES, HIDDEN, 2, bidirectional=True, batch_first=batch_first, dtype=torch.float64, **variant
    )
    dim, shape = (0, (BATCH, STEPS)) if batch_first else (1, (STEPS, BATCH))
    x = torch.randn(*shape, FEATURES, dtype=torch.float64)
    target = torch.randn(*shape, 2 * (getattr(layer, "proj_size", 0) or HIDDEN), dtype=torch.float64)
    expected = loop(layer, squares, (x,), target, dims=(dim, dim))
    with torch.no_grad():
        assert_same(fastrnn.per_sample_gradients(layer, squares, x, target, batch_dim=dim), expected)
    assert_same(fastrnn.per_sample_gradients(layer, squares, x, target, batch_dim=dim - 3, chunk_size=2), expected)
    assert all(parameter.grad is None for parameter in layer.parameters())


class Classifier(nn.Module):
    """A recurrent classifier of padded sentences, an embedding frozen."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, FEATURES, dtype=torch.float64).requires_grad_(False)
        self.layer = fastrnn.LSTM(FEATURES, HIDDEN, batch_first=True, dtype=torch.float64)
        self.head = nn.Linear(HIDDEN, 3, dtype=torch.float64)

    def forward(self, words, lengths):
        return self.head(self.layer(self.embedding(words), lengths=lengths)[1][0][-1])


def test_a_model_with_lengths():
    model = Classifier()
    words, lengths = torch.randint(10, (BATCH, STEPS)), torch.tensor([6, 2, 0, 5, 1])
    labels = torch.randint(3, (BATCH,))
    loss = nn.functional.cross_entropy
    gradients = fastrnn.per_sample_gradients(model, loss, (words, lengths), labels)
    assert "embedding.weight" not in gradients
    assert_same(gradients, loop(model, loss, (words, lengths), labels, dims=(0, 0, 0)))
    loss(model(words, lengths), labels, reduction="sum").backward()
    assert_same({name: gradient.sum(0) for name, gradient in gradients.items()}, gradients_of(model))


def gradients_of(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_dropout_differs_from_sample_to_sample():
    layer = fastrnn.GRU(FEATURES, 32, 2, dropout=0.5)
    x = torch.randn(STEPS, 1, FEATURES).expand(STEPS, BATCH, FEATURES)
    weight = fastrnn.per_sample_gradients(layer, lambda result: result[0].sum(), x, batch_dim=1)["weight_ih_l1"]
    assert all(not torch.allclose(weight[0], other) for other in weight[1:])


def test_errors():
    layer, x = fastrnn.GRU(FEATURES, HIDDEN), torch.randn(STEPS, BATCH, FEATURES)
    with pytest.raises(ValueError, match=r"batch_dim=1; their shapes are \(6, 5, 3\), \(5,\)"):
        fastrnn.per_sample_gradients(layer, squares, x, torch.zeros(BATCH), batch_dim=1)
    with pytest.raises(ValueError, match=r"as many samples each, counted by batch_dim=0; .* \(6, 5, 3\), \(5,\)"):
        fastrnn.per_sample_gradients(layer, squares, x, torch.zeros(BATCH))
    with pytest.raises(ValueError, match="one for each of 1 tensors"):
        fastrnn.per_sample_gradients(layer, squares, x, batch_dim=(1, 0))
    with pytest.raises(TypeError, match="is a PackedSequence"):
        fastrnn.per_sample_gradients(layer, squares, random_packed(2, 3, FEATURES, torch.float32, 0))
    with pytest.raises(RuntimeError, match="scalar"):
        fastrnn.per_sample_gradients(layer, lambda result: result[0], x, batch_dim=1)
