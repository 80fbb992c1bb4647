"""Random combinations of what a call and a layer may ask for beyond torch.nn, on every backend beside the reference."""

import random

import pytest
import torch
from helpers import CELLS, in_float64, random_packed, random_state, rule_violations, run
from torch import nn

import fastrnn

DRAWS = {"numba": 40, "triton": 12}
# Where the first draw of numbers breaks the rule, the average of some decides, as elsewhere.
MORE_NUMBERS = 8


class Called(nn.Module):
    """A layer with the further arguments of a call."""

    def __init__(self, layer, **arguments):
        super().__init__()
        self.layer, self.arguments = layer, arguments

    def forward(self, input, hx=None):
        return self.layer(input, hx, **self.arguments)


def draw(number, backend):
    """A layer, and a function from a seed to the input, the state and the call's further arguments."""
    choices = random.Random(number)
    cell = choices.choice(list(CELLS))
    class_name, options = CELLS[cell]
    steps, batch, features, hidden = (choices.randint(low, high) for low, high in ((1, 7), (1, 9), (1, 6), (2, 20)))
    options = options | {
        "num_layers": choices.randint(1, 2),
        "bidirectional": choices.random() < 0.5,
        "bias": choices.random() < 0.7,
        "batch_first": choices.random() < 0.5,
        "residual": choices.random() < 0.3,
        "weight_dropout": choices.choice([0.0, 0.3]),
    }
    if class_name == "LSTM" and backend == "numba" and choices.random() < 0.3:
        options["proj_size"] = choices.randint(1, hidden - 1)
    kind = choices.choice(["dense", "dense", "packed", "lengths"])
    with_resets = kind != "packed" and choices.random() < 0.6
    with_state, return_cells = choices.random() < 0.5, class_name == "LSTM" and choices.random() < 0.5
    torch.manual_seed(number)
    layer = getattr(fastrnn, class_name)(features, hidden, **options)
    layer.checkpoint = choices.choice([None, None, 1, 3])
    rows = (batch, steps) if options["batch_first"] else (steps, batch)

    def numbers(seed):
        generator = torch.Generator().manual_seed(seed)
        arguments = {"return_cells": True} if return_cells else {}
        if kind == "packed":
            input = random_packed(batch, steps, features, torch.float32, seed)
        else:
            input = torch.randn(*rows, features, generator=generator)
        if with_resets:
            arguments["resets"] = torch.rand(rows, generator=generator) < 0.3
        if kind == "lengths":
            arguments["lengths"] = torch.randint(0, steps + 1, (batch,), generator=generator)
        return input, random_state(layer, batch, torch.float32, seed) if with_state else None, arguments

    return layer, numbers


@pytest.mark.parametrize(
    ("backend", "number"), [(backend, number) for backend, count in DRAWS.items() for number in range(count)]
)
def test_combination(backend, number):
    layer, numbers = draw(number, backend)
    exact = in_float64(layer)

    def results(seed):
        input, hx, arguments = numbers(seed)
        found = []
        for name, module in ((backend, layer), ("reference", layer), ("reference", exact)):
            double = module is exact
            with fastrnn.use_backend(name):
                call = Called(module, **arguments)
                given = (in_float64(input), in_float64(hx)) if double else (input, hx)
                found.append(run(call, *given, choose=lambda returned: returned, seed=seed))
        return tuple(found)

    all_results = [results(0)]
    if rule_violations(all_results):
        all_results += [results(seed) for seed in range(1, MORE_NUMBERS)]
    problems = rule_violations(all_results)
    assert not problems, f"{layer}: {problems}"
