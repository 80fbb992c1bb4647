"""A workload made ready to run: fastrnn's module, torch's with the same weights, and their input."""

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn

from .workloads import Workload

State = Tensor | tuple[Tensor, Tensor] | None

# Carried over several steps in the check of a single step: one alone would not show a state that goes astray.
CHECKED_STEPS = 3


@dataclass(frozen=True)
class Inputs:
    """What a module is called with; hx only for a single step, the output's gradient only for training.

    resets, (T, B): the steps that begin an episode. torch's layer cannot do that and is timed without them.
    """

    input: Tensor | PackedSequence
    hx: State = None
    grad_output: Tensor | None = None
    resets: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "Inputs":
        return Inputs(cast(self.input, dtype), cast(self.hx, dtype), cast(self.grad_output, dtype), self.resets)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """A tensor, a packed sequence, a tuple of tensors or None in another dtype."""
    if isinstance(value, tuple) and not isinstance(value, PackedSequence):
        return tuple(item.to(dtype) for item in value)
    return None if value is None else value.to(dtype)


@dataclass(frozen=True)
class Case:
    """One module on its inputs in one of the modes."""

    module: nn.Module
    inputs: Inputs
    mode: str

    def callable(self) -> Callable[[], Any]:
        """One call of the workload: what is timed. It returns what it computed, nested as torch does."""
        return self._call_of(self._with_resets() if self._is_ours else self.module)

    @property
    def _is_ours(self) -> bool:
        return isinstance(self.module, fastrnn.RNN | fastrnn.GRU | fastrnn.LSTM)

    def _with_resets(self) -> Callable[..., Any]:
        """The module with the workload's resets: fastrnn's in one call, torch's step by step."""
        if self.inputs.resets is None:
            return self.module
        if self._is_ours:
            return functools.partial(self.module, resets=self.inputs.resets)
        return functools.partial(step_by_step, self.module, self.inputs.resets)

    def _call_of(self, layer: Callable[..., Any]) -> Callable[[], Any]:
        return {"train": self._training, "infer": self._inference, "step": self._stepping}[self.mode](layer)

    def _training(self, layer) -> Callable[[], Any]:
        input, grad_output = self.inputs.input, self.inputs.grad_output
        if isinstance(input, PackedSequence):
            leaf = input.data.detach().requires_grad_()
            input = PackedSequence(leaf, *input[1:])
        else:
            leaf = input = input.detach().requires_grad_()
        leaves = [leaf, *self.module.parameters()]

        def call():
            output, state = layer(input)
            data = output.data if isinstance(output, PackedSequence) else output
            return data, state, torch.autograd.grad(data, leaves, grad_output)

        return call

    def _inference(self, layer) -> Callable[[], Any]:
        return lambda: layer(self.inputs.input)

    def _stepping(self, layer) -> Callable[[], Any]:
        if stream := self._stream():
            x = self.inputs.input[0]
            return lambda: stream.step(x)
        state = self.inputs.hx

        def call():
            nonlocal state
            output, state = layer(self.inputs.input, state)
            return output, state

        return call

    def _stream(self) -> fastrnn.Stream | None:
        """What runs single steps: of fastrnn's module of one direction a stream, with the given state."""
        if not self._is_ours or self.module.bidirectional:
            return None
        stream = fastrnn.Stream(self.module, self.inputs.input.shape[1])
        stream.state = self.inputs.hx
        return stream

    def _runs(self) -> list[Any]:
        """The results of one call, nested as torch does; of a single step of several, whose state goes on."""
        if self.mode != "step":
            return [self._call_of(self._with_resets())()]
        if stream := self._stream():
            return [(stream.step(self.inputs.input[0])[None], stream.state) for _ in range(CHECKED_STEPS)]
        call = self.callable()
        return [call() for _ in range(CHECKED_STEPS)]

    def results(self) -> dict[str, Tensor]:
        """Everything that the workload computes, by name: outputs, states and, in training, gradients."""
        with torch.set_grad_enabled(self.mode == "train"):
            runs = self._runs()
        names = ["output", "h_n", "c_n"] if self.module.mode == "LSTM" else ["output", "h_n"]
        if self.mode == "train":
            names += ["grad input", *(f"grad {name}" for name, _ in self.module.named_parameters())]
        return {
            f"{name} of step {step}" if len(runs) > 1 else name: tensor.detach()
            for step, run in enumerate(runs)
            for name, tensor in zip(names, tensors_in(run), strict=True)
        }

    def in_dtype(self, dtype: torch.dtype) -> "Case":
        """The same numbers in another dtype, the module copied."""
        return replace(self, module=copy.deepcopy(self.module).to(dtype), inputs=self.inputs.to(dtype))


def step_by_step(layer: nn.RNNBase, resets: Tensor, input: Tensor) -> tuple[Tensor, State]:
    """torch's layer of one direction, called for a step at a time, its state multiplied by 1 - resets before each."""
    kept = (~resets).to(input.dtype)[:, :, None]
    sizes = (layer.hidden_size,) * (2 if layer.mode == "LSTM" else 1)
    state = tuple(input.new_zeros(layer.num_layers, input.shape[1], size) for size in sizes)
    outputs = []
    for x, keep in zip(input.split(1), kept, strict=True):
        state = tuple(part * keep for part in state)
        output, state = layer(x, state if layer.mode == "LSTM" else state[0])
        state = state if layer.mode == "LSTM" else (state,)
        outputs.append(output)
    return torch.cat(outputs), state if layer.mode == "LSTM" else state[0]


def stepping_cell(layer: nn.RNNBase, inputs: Inputs) -> Callable[[], Any]:
    """One call of torch's cell with the weights of `layer`: it can do a single step of one layer too."""
    kind = getattr(nn, f"{layer.mode.removesuffix('_TANH')}Cell")
    weight = layer.weight_ih_l0
    cell = kind(layer.input_size, layer.hidden_size, device=weight.device, dtype=weight.dtype)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.state_dict().items()})
    input = inputs.input[0]
    state = tuple(item[0] for item in inputs.hx) if isinstance(inputs.hx, tuple) else inputs.hx[0]

    def call():
        nonlocal state
        state = cell(input, state)
        return state

    return call


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The data tensors of a nested result, in order."""
    if isinstance(value, PackedSequence):
        yield value.data
    elif isinstance(value, tuple):
        for item in value:
            yield from tensors_in(item)
    else:
        yield value


@dataclass(frozen=True)
class Pair:
    """fastrnn's case and torch's, with the same weights and inputs."""

    ours: Case
    theirs: Case

    def torch_calls(self) -> dict[str, Callable[[], Any]]:
        """torch's calls by the name of what runs them: its layer, and its cell where that does the same."""
        layer = self.theirs.module
        name = f"nn.{type(layer).__name__}"
        calls = {name: self.theirs.callable()}
        if self.theirs.mode == "step" and layer.num_layers == 1 and not layer.bidirectional:
            calls[f"{name}Cell"] = stepping_cell(layer, self.theirs.inputs)
        return calls


def build(workload: Workload, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Pair:
    """Both sides of a workload, the weights and inputs drawn in float32 from `seed`."""
    torch.manual_seed(seed)
    sizes = (workload.input, workload.hidden, workload.layers)
    theirs, ours = (
        getattr(library, workload.cell)(*sizes, bidirectional=workload.bidirectional)
        .to(device, dtype)
        .train(workload.mode == "train")
        for library in (nn, fastrnn)
    )
    ours.load_state_dict(theirs.state_dict())
    inputs = draw_inputs(workload, dtype, device)
    return Pair(Case(ours, inputs, workload.mode), Case(theirs, inputs, workload.mode))


def draw_inputs(workload: Workload, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Normal inputs, states and gradients from torch's seeded generator.

    input: (T, B, input), or packed where the workload has padding; hx: (layers · directions, B, hidden);
    grad_output: as the output's data; resets: (T, B), as many as the workload says.
    """

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).to(device, dtype)

    input = draw(workload.time, workload.batch, workload.input)
    if workload.lengths is not None:
        input = pack_padded_sequence(input, torch.tensor(workload.lengths))
    hx = grad_output = None
    if workload.mode == "step":
        shape = (workload.layers * workload.directions, workload.batch, workload.hidden)
        hx = (draw(*shape), draw(*shape)) if workload.cell == "LSTM" else draw(*shape)
    elif workload.mode == "train":
        leading = input.data.shape[:-1]
        grad_output = draw(*leading, workload.directions * workload.hidden)
    resets = None
    if workload.resets:
        resets = (torch.rand(workload.time, workload.batch) < workload.resets).to(device)
    return Inputs(input, hx, grad_output, resets)
