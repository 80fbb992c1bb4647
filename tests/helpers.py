"""The one tolerance rule, and builders of a fastrnn module beside its torch.nn twin."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn

# Backends that run on any CPU; every test of numbers runs on each.
CPU_BACKENDS = ("numba", "reference")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Name in a test's id -> class name, extra constructor arguments.
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_tanh": ("RNN", {"nonlinearity": "tanh"}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "gru": ("GRU", {}),
    "lstm": ("LSTM", {}),
}

LAYER_CLASSES = ("RNN", "GRU", "LSTM")
CELL_CLASSES = ("RNNCell", "GRUCell", "LSTMCell")

# torch has no precision above float64 to measure errors by: there, both agree to this.
FLOAT64_AGREEMENT = 1e-12

# How many draws decide where the first one breaks the rule. With ReLU rounding flips a gradient on or off now and
# then, an error as large as the gradient: more draws to tell how often.
DRAWS = 24
DRAWS_WITH_RELU = 240

State = Tensor | tuple[Tensor, Tensor] | None
Results = dict[str, Tensor]


def ulp(dtype: torch.dtype, magnitude: float) -> float:
    """The distance between neighbouring numbers of `dtype` at `magnitude`.

    Kernels compute in float32 and may flush what is subnormal there.
    """
    info = torch.finfo(dtype)
    power = 2.0 ** (math.frexp(magnitude)[1] - 1)
    return max(info.eps * max(power, info.tiny), torch.finfo(torch.float32).tiny)


class Errors(NamedTuple):
    """Largest errors against float64, and what the rule allows besides."""

    ours: float
    theirs: float
    slack: float
    # How many numbers were compared, and the largest magnitude of the reference.
    count: int
    scale: float


def errors_against_float64(ours: Tensor, theirs: Tensor, reference: Tensor) -> Errors | str:
    """The errors of a result, or what else is wrong with it.

    NaN and infinities must stand where torch's stand; the errors are those of the other numbers.
    """
    if ours.dtype != theirs.dtype:
        return f"dtype {ours.dtype}, torch gives {theirs.dtype}"
    if ours.shape != theirs.shape:
        return f"shape {tuple(ours.shape)}, torch gives {tuple(theirs.shape)}"
    dtype = ours.dtype
    ours, theirs, reference = ours.detach().double(), theirs.detach().double(), reference.detach()
    if not torch.equal(ours.isnan(), theirs.isnan()):
        return f"{int(ours.isnan().sum())} NaN, torch gives {int(theirs.isnan().sum())} or elsewhere"
    infinite = theirs.isinf()
    if not torch.equal(ours.isinf(), infinite) or not torch.equal(ours[infinite], theirs[infinite]):
        return f"{int(ours.isinf().sum())} infinities, torch gives {int(infinite.sum())} or elsewhere"
    finite = theirs.isfinite() & reference.isfinite()
    if not finite.any():
        return Errors(0.0, 0.0, 0.0, 0, 0.0)
    ours, theirs, reference = ours[finite], theirs[finite], reference[finite]
    scale = reference.abs().max().item()
    slack = FLOAT64_AGREEMENT * max(1.0, scale) if dtype == torch.float64 else ulp(dtype, scale)
    mine, torchs = ((result - reference).abs().max().item() for result in (ours, theirs))
    return Errors(mine, torchs, slack, ours.numel(), scale)


def rule_violation(draws: list[Errors | str], middle: Callable[[Sequence[float]], float] = mean) -> str | None:
    """What breaks the tolerance rule in the draws of one result, in their ``middle``, or None.

    The rule: our largest error against float64 is at most twice that of torch.nn in the same dtype, plus one
    unit in the last place at the reference's largest magnitude.
    """
    for draw in draws:
        if isinstance(draw, str):
            return draw
    ours, theirs, slack, *_ = (middle(values) for values in zip(*draws, strict=True))
    if ours <= 2 * theirs + slack:
        return None
    numbers = f"{draws[0].count} numbers up to {max(draw.scale for draw in draws):.3e}"
    return f"error {ours:.2e}, torch's {theirs:.2e}, one ulp {slack:.2e} ({numbers}, {len(draws)} draws)"


def assert_within_rule(ours: Tensor, theirs: Tensor, reference: Tensor, name: str = "result") -> None:
    """Fails unless `ours` keeps the tolerance rule beside `theirs` (torch.nn, same dtype) and float64."""
    problem = rule_violation([errors_against_float64(ours, theirs, reference)])
    assert problem is None, f"{name}: {problem}"


def make_pair(class_name: str, *args, seed: int = 0, train: bool = True, **kwargs) -> tuple[nn.Module, nn.Module]:
    """A fastrnn module and its torch.nn twin with equal weights."""
    torch.manual_seed(seed)
    theirs = getattr(nn, class_name)(*args, **kwargs)
    ours = getattr(fastrnn, class_name)(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return ours.train(train), theirs.train(train)


def in_float64(value: Any) -> Any:
    """The same module, tensor, state or packed sequence in float64, holding the same (rounded) numbers."""
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).double()
    if isinstance(value, PackedSequence):
        return PackedSequence(value.data.detach().double(), *value[1:])
    if isinstance(value, Tensor):
        return value.detach().double()
    if isinstance(value, tuple):
        return tuple(in_float64(item) for item in value)
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The data tensors in an output: a tensor, a packed sequence or any nesting of tuples of them."""
    if isinstance(value, PackedSequence):
        yield value.data
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from tensors_in(item)


def fresh_leaf(value: Any, requires_grad: bool) -> Any:
    """The same input with the same strides as new autograd leaves."""
    if isinstance(value, PackedSequence):
        return PackedSequence(value.data.detach().requires_grad_(requires_grad), *value[1:])
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(requires_grad)
    if isinstance(value, tuple):
        return tuple(fresh_leaf(item, requires_grad) for item in value)
    return value


def run(
    module: nn.Module,
    input: Any,
    hx: State = None,
    *,
    backward: bool = True,
    choose: Callable[[Any], Any] | None = None,
    seed: int = 0,
) -> Results:
    """One forward and backward pass: outputs and the gradients of input, hx and every parameter, by name.

    choose: picks the outputs from what the module returns; a gradient that is None then is as good as zeros.
    seed: fixes the dropout masks and the incoming gradients, the same numbers in every dtype.
    """
    input, hx = fresh_leaf(input, backward), fresh_leaf(hx, backward)
    module.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    with torch.set_grad_enabled(backward):
        returned = module(input, hx) if hx is not None else module(input)
    outputs = list(tensors_in(returned if choose is None else choose(returned)))
    results = {f"output[{index}]": output.detach() for index, output in enumerate(outputs)}
    if not backward:
        return results
    generator = torch.Generator().manual_seed(seed)
    # Steps of 1/8 are exact in every dtype.
    cotangents = [(torch.randint(-16, 17, output.shape, generator=generator) / 8).to(output) for output in outputs]
    torch.autograd.backward(outputs, cotangents)
    leaves = {f"input[{i}]": leaf for i, leaf in enumerate(tensors_in(input))}
    leaves |= {f"hx[{i}]": leaf for i, leaf in enumerate(tensors_in(hx))}
    leaves |= dict(module.named_parameters())
    for name, leaf in leaves.items():
        zeros = leaf.grad is None and choose is not None
        results[f"grad {name}"] = torch.zeros_like(leaf) if zeros else leaf.grad
    return results


def rule_violations(draws: list[tuple[Results, Results, Results]]) -> dict[str, str]:
    """Every result that breaks the rule and how, the draws of one case taken together."""
    problems = {}
    ours, theirs, _ = draws[0]
    if ours.keys() != theirs.keys():
        return {"results": f"{list(ours)}, torch gives {list(theirs)}"}
    for name in ours:
        three = [tuple(results[name] for results in draw) for draw in draws]
        missing = {(mine is None, torchs is None) for mine, torchs, _ in three}
        if missing == {(True, True)}:
            continue
        if missing != {(False, False)}:
            problems[name] = "only one of ours and torch's is None"
            continue
        problem = rule_violation([errors_against_float64(*results) for results in three])
        if problem is not None:
            problems[name] = problem
    return problems


def assert_same_as_torch(
    make: Callable[[int], tuple[nn.Module, nn.Module, Any, State]],
    *,
    exact: nn.Module | None = None,
    backend: str | None = None,
    backward: bool = True,
    choose: Callable[[Any], Any] | None = None,
) -> None:
    """Outputs and every gradient keep the tolerance rule.

    The rule compares two maxima, and a maximum over a handful of numbers is a matter of luck: where the first
    draw breaks the rule, the average over DRAWS draws decides.

    make: draws one case from a seed: our module, torch's, the input and hx.
    exact: torch's module in float64, where no copy of the one from `make` will do.
    backend: the backend to force, or None for the one that dispatch picks.
    choose: picks the outputs to compare, as in `run`.
    """

    def draw(seed: int) -> tuple[Results, Results, Results]:
        ours, theirs, input, hx = make(seed)
        how = {"backward": backward, "choose": choose, "seed": seed}
        with contextlib.nullcontext() if backend is None else fastrnn.use_backend(backend):
            mine = run(ours, input, hx, **how)
        torchs = run(theirs, input, hx, **how)
        reference = in_float64(theirs) if exact is None else exact
        return mine, torchs, run(reference, in_float64(input), in_float64(hx), **how)

    draws = [draw(0)]
    problems = rule_violations(draws)
    relu = getattr(make(0)[0], "nonlinearity", None) == "relu"
    for count in (DRAWS, DRAWS_WITH_RELU) if relu else (DRAWS,):
        if problems:
            draws += map(draw, range(len(draws), count))
            problems = rule_violations(draws)
    assert not problems, "\n".join(f"{name}: {problem}" for name, problem in problems.items())


def random_packed(
    batch: int, steps: int, features: int, dtype: torch.dtype, seed: int, enforce_sorted: bool = False
) -> PackedSequence:
    """A packed sequence of random lengths, the longest of `steps` time steps."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, steps + 1, (batch,), generator=generator)
    lengths[int(torch.randint(batch, (), generator=generator))] = steps
    if enforce_sorted:
        lengths = lengths.sort(descending=True).values
    padded = torch.randn(steps, batch, features, generator=generator).to(dtype)
    return pack_padded_sequence(padded, lengths, enforce_sorted=enforce_sorted)


def random_state(module: nn.RNNBase, batch: int | None, dtype: torch.dtype, seed: int) -> State:
    """A random hx of the shape that `module` expects, without a batch dimension where `batch` is None."""
    generator = torch.Generator().manual_seed(seed)
    groups = module.num_layers * (2 if module.bidirectional else 1)
    middle = () if batch is None else (batch,)

    def draw(size: int) -> Tensor:
        return torch.randn(groups, *middle, size, generator=generator).to(dtype)

    h_0 = draw(module.proj_size or module.hidden_size)
    return (h_0, draw(module.hidden_size)) if module.mode == "LSTM" else h_0


def outcome(call: Callable[[], Any]) -> Any:
    """What `call` returns, or the exception it raises."""
    try:
        return call()
    except Exception as error:
        return error


def assert_same_error(ours: Callable[[], Any], theirs: Callable[[], Any]) -> None:
    """Both calls raise, with the same type and the same message."""
    expected, got = outcome(theirs), outcome(ours)
    assert isinstance(expected, Exception), f"torch raises nothing; ours: {got!r}"
    assert type(got) is type(expected), f"ours: {got!r}; torch's: {expected!r}"
    assert str(got) == str(expected)
