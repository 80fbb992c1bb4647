"""Random configurations, some deliberately bad, against torch.nn: outputs, gradients, exceptions.

FASTRNN_DIFFERENTIAL is how many configurations run (300 unless told); each is drawn from its number alone, so that
`check(draw_configuration(number))` repeats a failure.
"""

import os
import random
import warnings
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from helpers import DTYPES, assert_same_as_torch, make_pair, outcome, random_packed, random_state
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import fastrnn

COUNT = int(os.environ.get("FASTRNN_DIFFERENTIAL", "300"))
# One test per this many configurations: enough tests to see where it fails, few enough not to drown the others.
PER_TEST = 20


class Configuration(NamedTuple):
    number: int
    class_name: str
    arguments: dict[str, Any]
    dtype: torch.dtype
    # The sizes of the input; batch is None for unbatched input.
    features: int
    batch: int | None
    steps: int
    # The standard deviation of the input: far out, the gates saturate.
    scale: float
    packed: str | None
    hx: bool
    input_layout: str
    hx_layout: str
    training: bool
    backward: bool
    # What is wrong with the call, if anything.
    flaw: str | None


LAYOUTS = ["contiguous", "contiguous", "transposed", "every_second", "expanded"]

CONSTRUCTOR_FLAWS = {
    "hidden_size": [0, -2, 3.0, "3", None],
    "input_size": [0, -1, 2.0, None],
    "num_layers": [0, -1],
    "bias": [0, "yes", None],
    "batch_first": [1, "no"],
    "dropout": [-0.5, 1.5, True, "x"],
    "proj_size": [-1, 1000],
    "nonlinearity": ["sigmoid", ""],
}
CALL_FLAWS = [
    "input features",
    "input dimensions",
    "input dtype",
    "input None",
    "no steps",
    "hx dimensions",
    "hx size",
    "hx batch",
    "hx layers",
    "hx type",
    "hx device",
    "input device",
]


def draw_configuration(number: int) -> Configuration:
    choose = random.Random(number)
    class_name = choose.choice(["RNN", "RNN", "GRU", "GRU", "LSTM", "LSTM", "LSTM", "RNNCell", "GRUCell", "LSTMCell"])
    is_cell = class_name.endswith("Cell")
    hidden = choose.choice([1, 2, 3, 5, 8, 16, 17, 31, 40])
    features = choose.choice([1, 2, 4, 7, 16, 19])
    dtype = choose.choice([*DTYPES, torch.float32])
    arguments = {"input_size": features, "hidden_size": hidden, "dtype": dtype, "bias": choose.random() < 0.7}
    if class_name in ("RNN", "RNNCell"):
        arguments["nonlinearity"] = choose.choice(["tanh", "relu"])
    if not is_cell:
        arguments["num_layers"] = choose.choice([1, 1, 2, 3])
        arguments["batch_first"] = choose.random() < 0.4
        arguments["bidirectional"] = choose.random() < 0.4
        arguments["dropout"] = choose.choice([0.0, 0.0, 0.4]) if arguments["num_layers"] > 1 else 0.0
        if class_name == "LSTM" and hidden > 1 and choose.random() < 0.35:
            arguments["proj_size"] = choose.randrange(1, hidden)
    flaw = None
    if choose.random() < 0.2:
        kind = choose.choice([*CONSTRUCTOR_FLAWS, *CALL_FLAWS, *CALL_FLAWS])
        if kind == "nonlinearity" and class_name != "RNN":
            # An unknown argument: Python's own message, which names the function.
            kind = "hx size"
        if kind in CONSTRUCTOR_FLAWS and not is_cell:
            arguments[kind] = choose.choice(CONSTRUCTOR_FLAWS[kind])
            flaw = f"argument {kind}"
        elif kind in CALL_FLAWS:
            flaw = kind
    batches = [None, 0, 1, 2, 3, 5, 16, 33]
    if (flaw or "").endswith("device"):
        # torch.nn lets nothing at all pass on any device.
        batches.remove(0)
    return Configuration(
        number,
        class_name,
        arguments,
        dtype,
        features,
        batch=choose.choice(batches),
        steps=1 if is_cell else choose.choice([1, 2, 3, 8, 21]),
        scale=choose.choice([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.01, 30.0]),
        packed=None if is_cell else choose.choice([None, None, "sorted", "unsorted"]),
        hx=choose.random() < 0.6 or (flaw or "").startswith("hx"),
        input_layout=choose.choice(LAYOUTS),
        hx_layout=choose.choice(LAYOUTS),
        training=choose.random() < 0.7,
        backward=choose.random() < 0.85,
        flaw=flaw,
    )


def lay_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers in other strides; only an expanded tensor repeats its first row."""
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "every_second":
        return torch.stack([tensor, torch.full_like(tensor, float("nan"))], -1).flatten(-2)[..., ::2]
    if layout == "expanded" and tensor.numel():
        return tensor[:1].expand(tensor.shape)
    return tensor.contiguous()


def build_input(c: Configuration, seed: int) -> Any:
    generator = torch.Generator().manual_seed(1000 * c.number + seed)
    if c.packed and c.batch:
        packed = random_packed(c.batch, c.steps, c.features, c.dtype, 1000 * c.number + seed, c.packed == "sorted")
        return PackedSequence(packed.data * c.scale, *packed[1:])
    shape = [c.features] if c.class_name.endswith("Cell") else [c.steps, c.features]
    if c.batch is not None:
        shape.insert(0 if c.arguments.get("batch_first") is True else len(shape) - 1, c.batch)
    if c.flaw == "input features":
        shape[-1] += 1
    if c.flaw == "input dimensions":
        shape = [1, 1, *shape]
    if c.flaw == "no steps" and len(shape) > 1:
        shape[1 if len(shape) == 3 and c.arguments.get("batch_first") is True else 0] = 0
    input = lay_out((torch.randn(shape, generator=generator) * c.scale).to(c.dtype), c.input_layout)
    if c.flaw == "input dtype":
        return input.to(torch.float32 if c.dtype == torch.float64 else torch.float64)
    if c.flaw == "input device":
        return input.to("meta")
    return None if c.flaw == "input None" else input


def build_hx(c: Configuration, module: nn.Module, seed: int) -> Any:
    if not c.hx:
        return None
    seed = 1000 * c.number + seed
    if c.class_name.endswith("Cell"):
        generator = torch.Generator().manual_seed(seed)
        shape = [module.hidden_size] if c.batch is None else [c.batch, module.hidden_size]
        h, cell = (torch.randn(shape, generator=generator).to(c.dtype) for _ in range(2))
        hx = (h, cell) if c.class_name == "LSTMCell" else h
    else:
        hx = random_state(module, c.batch, c.dtype, seed)
    change = {
        "hx dimensions": lambda t: t[None],
        "hx size": lambda t: torch.cat([t, t], -1),
        "hx batch": lambda t: torch.cat([t, t], -2) if t.dim() > 1 else t[None, None, None],
        "hx layers": lambda t: torch.cat([t, t], 0),
        "hx device": lambda t: t.to("meta"),
    }.get(c.flaw, lambda t: lay_out(t, c.hx_layout))
    if c.flaw == "hx type":
        return hx[0] if isinstance(hx, tuple) else (hx, hx)
    return tuple(map(change, hx)) if isinstance(hx, tuple) else change(hx)


def build(c: Configuration, seed: int) -> tuple[nn.Module, nn.Module, Any, Any]:
    arguments = dict(c.arguments)
    ours, theirs = make_pair(c.class_name, seed=seed, train=c.training, **arguments)
    return ours, theirs, build_input(c, seed), build_hx(c, ours, seed)


def check_construction(c: Configuration) -> bool:
    """Whether the module can be made; if not, both say so in the same words."""
    results = [outcome(partial(getattr(package, c.class_name), **c.arguments)) for package in (fastrnn, nn)]
    got, expected = results
    if isinstance(expected, Exception):
        assert (type(got), str(got)) == (type(expected), str(expected))
        return False
    assert not isinstance(got, Exception), got
    return True


def check(c: Configuration) -> None:
    if not check_construction(c):
        return
    ours, theirs, input, hx = build(c, 0)
    arguments = (input,) if hx is None else (input, hx)
    expected = outcome(partial(theirs, *arguments))
    if not isinstance(expected, Exception) and not (c.flaw or "").endswith("device"):
        assert_same_as_torch(partial(build, c), backward=c.backward)
        return
    got = outcome(partial(ours, *arguments))
    if not isinstance(expected, Exception):
        # A cell of torch.nn does not always look at the device; its result lies nowhere.
        assert isinstance(got, (torch.Tensor, tuple, RuntimeError)), got
        return
    assert type(got) is type(expected), f"{got!r}, torch raises {expected!r}"
    # In these torch.nn prints the signatures of its own functions.
    if "argument 'hx'" not in str(expected) and "invalid combination" not in str(expected):
        assert str(got) == str(expected)


@pytest.mark.parametrize("first", range(0, COUNT, PER_TEST))
def test_random_configurations(first):
    failures = []
    for number in range(first, min(first + PER_TEST, COUNT)):
        configuration = draw_configuration(number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                check(configuration)
            except Exception as error:
                failures.append(f"{configuration}\n    {type(error).__name__}: {error}")
    assert not failures, "\n".join(failures)


def test_the_configurations_reach_what_they_should():
    """The random draw covers every class, dtype, form of input and flaw."""
    drawn = [draw_configuration(number) for number in range(300)]
    assert len({(c.class_name, c.dtype) for c in drawn}) == 6 * 4
    assert {c.packed for c in drawn if c.batch} == {None, "sorted", "unsorted"}
    assert {c.batch for c in drawn} >= {None, 0, 1, 33}
    assert {c.flaw for c in map(draw_configuration, range(2000))} >= {
        None,
        *CALL_FLAWS,
        *(f"argument {name}" for name in CONSTRUCTOR_FLAWS),
    }
    assert any(c.arguments.get("proj_size") and c.arguments["bidirectional"] for c in drawn)
    assert 0.7 < sum(c.flaw is None for c in drawn) / len(drawn) < 0.9
