"""``RNN``, ``GRU``, ``LSTM`` and their cells: torch.nn's signatures, parameters, checks and results.

The layers subclass ``torch.nn.RNNBase`` and not ``torch.nn.LSTM``, because ``torch.compile(fullgraph=True)``
refuses every ``isinstance(module, torch.nn.LSTM)``. Whatever is out of the ordinary (a wrong shape, an odd
dtype, an empty input) goes to torch.nn's own ``forward``, which runs on these modules as it does on its own:
its errors are ours by construction.
"""

from __future__ import annotations

import math
import weakref
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.rnn import RNNCellBase
from torch.nn.utils.rnn import PackedSequence

from . import dispatch, functional
from . import lengths as _lengths
from . import options as of_options
from .options import Options
from .reference import CELLS

State = Tensor | tuple[Tensor, Tensor]


def _select(call: tuple) -> str:
    """The name of the backend for ``call``, the fields of a ``dispatch.Call``."""
    if torch.compiler.is_dynamo_compiling():
        from . import _compile

        return _compile.select(dispatch.choice.name, *call)
    return dispatch.select(dispatch.Call(*call)).backend


def _run_layer(*arguments) -> tuple[Tensor, ...]:
    if torch.compiler.is_dynamo_compiling():
        from . import _compile

        return _compile.layer(*arguments)
    return functional.layer(*arguments)


def _autocast_is_on(input: Tensor) -> bool:
    device = input.device.type
    # asking for a device that has no autocast (meta) raises
    return torch._C._is_any_autocast_enabled() and (
        torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    )


def _autocast_dtype(input: Tensor) -> torch.dtype:
    """The dtype to compute in: autocast's if that is on (and the input no float64, which it leaves alone)."""
    if input.dtype.is_floating_point and input.dtype != torch.float64 and _autocast_is_on(input):
        return torch.get_autocast_dtype(input.device.type)
    return input.dtype


def _fits(tensor: Tensor, input: Tensor, autocast: bool) -> bool:
    """Whether a weight or state fits ``input``: in device and, where autocast does not see to it, in dtype."""
    if tensor.device != input.device:
        return False
    if tensor.dtype == input.dtype:
        return True
    return autocast and all(dtype.is_floating_point and dtype != torch.float64 for dtype in (tensor.dtype, input.dtype))


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def _state(hx: State | None, is_lstm: bool) -> tuple[Tensor, ...] | None:
    """hx as a tuple of tensors, () where it is absent, None where it is not what the cell takes."""
    if hx is None:
        return ()
    if not is_lstm:
        return (hx,) if isinstance(hx, Tensor) else None
    if isinstance(hx, tuple | list) and len(hx) == 2 and all(isinstance(part, Tensor) for part in hx):
        return tuple(hx)
    return None


def _as_call_module(module: nn.Module, input: torch.fx.Proxy, hx, **more) -> torch.fx.Proxy:
    """A node for ``torch.fx.symbolic_trace``, which keeps only torch.nn's own modules whole by itself."""
    arguments = (input,) if hx is None else (input, hx)
    more = {name: value for name, value in more.items() if value is not None}
    return input.tracer.create_proxy("call_module", input.tracer.path_of_module(module), arguments, more)


class _Layer(nn.RNNBase):
    """What the three layers share; ``_torch`` is the torch.nn class that a subclass stands in for."""

    _torch: ClassVar[type[nn.RNNBase]]
    # What the module does beyond torch.nn's, None for nothing.
    _options: Options | None = None

    @property
    def checkpoint(self) -> int | None:
        """After how many time steps training keeps the state; None keeps everything."""
        return self.__dict__.get("_checkpoint")

    @checkpoint.setter
    def checkpoint(self, value: int | None) -> None:
        counts = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if value is not None and not counts:
            raise ValueError(f"checkpoint should be None or a number of time steps, 1 or more, got {value!r}")
        of_options.refuse_checkpoint(self._options, value)
        self.__dict__["_checkpoint"] = value

    def _set_options(self, options: Options, checkpoint: int | None) -> None:
        """The end of a constructor: check what torch.nn does not know, and make its parameters."""
        options = of_options.checked(options, self.mode, self.hidden_size)
        if options is not None:
            self._options = options
        self.checkpoint = checkpoint
        if options is None:
            return
        like = self.weight_ih_l0
        for name, (_, size) in self._further_parameters().items():
            self.register_parameter(name, nn.Parameter(like.new_empty(size)))
        self._reset_further_parameters()

    def _further_parameters(self) -> dict[str, tuple[str, int]]:
        """Names of the parameters that torch.nn does not have, each with its role and length."""
        sizes = of_options.parameter_sizes(self._options, self.mode, self.hidden_size)
        return {
            f"{role}_l{layer}{suffix}": (role, size)
            for layer in range(self.num_layers)
            for suffix in ("", "_reverse")[: 2 if self.bidirectional else 1]
            for role, size in sizes.items()
        }

    def _reset_further_parameters(self) -> None:
        bound = 1 / math.sqrt(self.hidden_size)  # the bits of torch.nn
        for name, (role, _) in self._further_parameters().items():
            if "_ln_" in role:
                nn.init.constant_(getattr(self, name), role.startswith("weight"))
            else:
                nn.init.uniform_(getattr(self, name), -bound, bound)

    def reset_parameters(self) -> None:
        """Draw all parameters anew: uniform up to 1 / sqrt(hidden_size); layer normalization begins with 1 and 0."""
        if self._options is None:
            super().reset_parameters()
            return
        bound, further = 1 / math.sqrt(self.hidden_size), self._further_parameters()
        for name, parameter in self.named_parameters():
            if name not in further:
                nn.init.uniform_(parameter, -bound, bound)  # the bits of torch.nn
        self._reset_further_parameters()

    def extra_repr(self) -> str:
        more = "" if self.checkpoint is None else f", checkpoint={self.checkpoint}"
        if self._options is not None:
            more += f", {self._options}"
        return super().extra_repr() + more

    # torch keeps lists of its weights that go stale (after functional_call, deepcopy, a parametrization). Here they are
    # looked up when they are needed.

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: list[Tensor | None]) -> None:
        pass

    def __setattr__(self, name: str, value) -> None:
        nn.Module.__setattr__(self, name, value)

    def _init_flat_weights(self) -> None:
        pass

    def _update_flat_weights(self) -> None:
        pass

    def flatten_parameters(self) -> None:
        """Do nothing: the kernels take weights wherever they lie. Kept because models call it."""

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        state.pop("_flat_weight_refs", None)
        return state

    def __setstate__(self, state: dict) -> None:
        super().__setstate__({name: value for name, value in state.items() if name != "_flat_weights"})

    def _call(self, dtype: torch.dtype, device: str) -> tuple:
        """The fields of this module's ``dispatch.Call``."""
        directions = 2 if self.bidirectional else 1
        cell = self.mode.lower()
        call = cell, device, dtype, self.input_size, self.hidden_size, self.proj_size, directions
        return call if self._options is None else (*call, self._options.in_effect(self.training))

    def _weights(self) -> list[list[Tensor | None]]:
        """Per layer and direction: weight_ih, weight_hh, then the biases and weight_hr as far as there are any."""
        parameters = self._parameters  # skips Module.__getattr__, which costs more than the rest of this function
        return [
            [parameters[name] if name in parameters else getattr(self, name, None) for name in names]
            for names in self._all_weights
        ]

    def _groups(self) -> list[list[Tensor | None]]:
        """Per layer and direction: weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, None where absent."""
        return [_by_role(group, self.bias) for group in self._weights()]

    def _is_ordinary(self, input: Tensor, state, weights, batch: int, unbatched: bool) -> bool:
        """Whether shapes, dtypes and devices are what they should be. Everything else is left to torch.nn."""
        if input.shape[-1] != self.input_size or input.numel() == 0:
            return False
        autocast = _autocast_is_on(input)
        layers = self.num_layers * (2 if self.bidirectional else 1)
        sizes = (self.proj_size or self.hidden_size, self.hidden_size)
        for part, size in zip(state, sizes, strict=False):
            expected = (layers, size) if unbatched else (layers, batch, size)
            if part.shape != expected or not _fits(part, input, autocast):
                return False
        return all(
            isinstance(weight, Tensor) and _fits(weight, input, autocast) for group in weights for weight in group
        )

    def forward(self, input, hx=None, *, resets=None, lengths=None, return_cells=False):
        """Run the layers over ``input``; arguments, results and errors as in torch.nn.

        Args:
            input: (T, B, I), (B, T, I) with ``batch_first``, (T, I) for a single sequence, or a ``PackedSequence``.
            hx: initial state, (num_layers * D, B, H') with H' = proj_size or hidden_size and D directions, without
                the B for a single sequence; for the LSTM a pair of it and the cell state (.., B, hidden_size).
                Zeros if None.
            resets: (T, B) bool, laid out as the input: where True, the state of every layer is zero before that step,
                and no gradient crosses. A new episode begins there: the reverse direction forgets between t and t - 1
                as well. For tensors, not for a ``PackedSequence``.
            lengths: (B,) of whole numbers from 0 to T, () for a single sequence, on any device: how many steps of each
                sequence count. The result is that of ``pack_padded_sequence``, this call and ``pad_packed_sequence``:
                the output is zero past the end, the final state that after the last step that counts (``hx`` if none
                does), and the reverse direction starts there. On a GPU plain torch operations run it: no value is
                waited for, but it is slower.
            return_cells: for the LSTM, whether to return the last layer's cell state after every step as well.

        Raises:
            TypeError: return_cells of an RNN or a GRU.
            ValueError, TypeError: resets or lengths of a wrong shape, dtype or device, negative lengths or longer ones
                than T, or one of the two beside packed input. Lengths on a GPU, or in a compiled program, are
                checked when that gets there.

        Returns:
            output (T, B, D * H') of the last layer, laid out as the input, and the final state, laid out as ``hx``.
            With ``return_cells`` also the cell states, (T, B, D * hidden_size), laid out as the output.
        """
        if isinstance(input, torch.fx.Proxy):
            more = {"resets": resets, "lengths": lengths, "return_cells": return_cells or None}
            return _as_call_module(self, input, hx, **more)
        beyond_torch = resets is not None or lengths is not None or return_cells or self._options is not None
        if return_cells and self.mode != "LSTM":
            kind = type(self).__name__
            raise TypeError(f"return_cells is for the LSTM: {kind} has no cell state, its output holds every state")
        prepared = self._prepare(input, hx, beyond_torch)
        if prepared is None:
            result = self._torch.forward(self, input, hx)
            if beyond_torch:
                given = {"resets": resets is not None, "lengths": lengths is not None, "return_cells": return_cells}
                asked = [name for name, is_given in given.items() if is_given]
                asked += [] if self._options is None else [str(self._options)]
                form = "an input of torch.nn's ordinary form, with at least one element"
                raise ValueError(f"{', '.join(asked)}: this needs {form}")
            return result
        backend, rows, batch_sizes, batch, state, weights, dtype = prepared
        packed = isinstance(input, PackedSequence)
        unbatched = not packed and input.dim() == 2
        if lengths is not None:
            return self._forward_with_lengths(input, lengths, resets, return_cells, prepared, unbatched)
        if resets is not None:
            resets = self._resets_of_rows(input, resets)
        if packed and state and input.sorted_indices is not None:
            state = tuple(part.index_select(1, input.sorted_indices) for part in state)
        output, final, cells = self._run(
            backend, rows, batch_sizes, batch, state, weights, dtype, unbatched, resets, None, return_cells
        )
        if packed:
            if input.unsorted_indices is not None:
                final = tuple(part.index_select(1, input.unsorted_indices) for part in final)
            output = PackedSequence(output, input.batch_sizes, input.sorted_indices, input.unsorted_indices)
            if return_cells:
                return output, final, PackedSequence(cells, *output[1:])
        else:
            output = self._laid_out(output, batch, unbatched)
            if unbatched:
                final = tuple(part.squeeze(1) for part in final)
            if return_cells:
                return output, final, self._laid_out(cells, batch, unbatched)
        return output, final if self.mode == "LSTM" else final[0]

    def _laid_out(self, rows: Tensor, batch: int, unbatched: bool) -> Tensor:
        """Rows of a dense input's output, laid out as that input."""
        if unbatched:
            return rows
        rows = rows.view(-1, batch, rows.shape[-1])
        return rows.transpose(0, 1) if self.batch_first else rows

    def _forward_with_lengths(self, input, lengths, resets, return_cells, prepared, unbatched):
        """``forward`` of a padded batch, after ``_prepare``."""
        backend, rows, _, batch, state, weights, dtype = prepared
        if isinstance(input, PackedSequence):
            raise ValueError("lengths go with a padded tensor, got a PackedSequence, which has its own")
        steps = rows.shape[0] // batch
        numbers = _lengths.checked(lengths, input, steps, () if unbatched else (batch,))
        # on a GPU kernels would have to be told the numbers of rows, for which this call would wait
        packing = None
        if input.device.type == "cpu" and backend != "reference" and not self._is_unrolled(numbers):
            packing = _lengths.pack(numbers, steps, batch)
        if resets is not None:
            resets = self._resets_of_rows(input, resets, numbers)
        if unbatched:
            state = tuple(part.unsqueeze(1) for part in state)
        if packing is None:
            numbers = numbers.to(rows.device, non_blocking=True)
            call = ("reference", rows, None, batch, state, weights, dtype, False, resets, numbers, return_cells)
        else:
            rows, state = packing.pack(rows), tuple(packing.pack_state(part) for part in state)
            resets = None if resets is None else resets.index_select(0, packing.index)
            sequences = packing.order.shape[0]
            call = (
                backend,
                rows,
                packing.batch_sizes,
                sequences,
                state,
                weights,
                dtype,
                False,
                resets,
                None,
                return_cells,
            )
        output, final, cells = self._run(*call)
        results = [output] if cells is None else [output, cells]
        if packing is not None:
            results = [packing.unpack(result) for result in results]
            final = packing.unpack_states(final, batch)
        if unbatched:
            final = tuple(part.squeeze(1) for part in final)
        output, *cells = (self._laid_out(result, batch, unbatched) for result in results)
        return output, final if self.mode == "LSTM" else final[0], *cells

    def _is_unrolled(self, lengths: Tensor) -> bool:
        """Whether a tracer will record the step of an option one by one: then it must not record batch sizes too."""
        if self._options is None or not of_options.STEP_OPTIONS.intersection(self._options.in_effect(self.training)):
            return False
        return torch.compiler.is_compiling() or torch.jit.is_tracing() or type(lengths) is not Tensor

    def _resets_of_rows(self, input, resets, lengths=None) -> Tensor:
        """``resets`` of a call as (rows, D): whether a direction's state is zero before its step of a row."""
        if isinstance(input, PackedSequence):
            raise ValueError("resets go with a tensor, got a PackedSequence: pad it and pass lengths=")
        if not isinstance(resets, Tensor) or resets.dtype != torch.bool:
            got = resets.dtype if isinstance(resets, Tensor) else type(resets).__name__
            raise TypeError(f"resets should be a tensor of torch.bool, got {got}: try resets.bool()")
        if resets.shape != input.shape[:-1]:
            expected, layout = tuple(input.shape[:-1]), "the input's shape without its features"
            raise ValueError(f"resets should have the shape {expected}, {layout}, got {tuple(resets.shape)}")
        if resets.device != input.device:
            raise ValueError(f"resets should be on the input's device {input.device}, got {resets.device}")
        if input.dim() == 3 and self.batch_first:
            resets = resets.transpose(0, 1)
        if lengths is None and not self.bidirectional:
            return resets.reshape(-1, 1)
        forward = resets.reshape(resets.shape[0], -1)
        if lengths is not None:
            forward = forward & (
                torch.arange(len(forward), device=forward.device)[:, None] < lengths.to(forward.device)
            )
        if not self.bidirectional:
            return forward.reshape(-1, 1)
        backward = torch.cat([forward[1:], torch.zeros_like(forward[:1])])
        return torch.stack([forward, backward], -1).reshape(-1, 2)

    def _prepare(self, input, hx, beyond_torch=False):
        """Backend, rows (R, I), batch_sizes, batch, state, weights, dtype of a call; None leaves it to torch.nn.

        ``beyond_torch``: the call has what torch.nn does not know, so that its backend cannot run it.
        """
        state = _state(hx, self.mode == "LSTM")
        weights = self._weights()
        if state is None:
            return None
        batch_sizes, unbatched = None, False
        if isinstance(input, PackedSequence):
            data, batch_sizes = input.data, input.batch_sizes
            if data.dim() != 2 or not _is_packing(batch_sizes, data.shape[0]):
                return None
            batch = int(batch_sizes[0])
            if input.sorted_indices is not None and input.sorted_indices.shape != (batch,):
                return None
        elif isinstance(input, Tensor) and input.dim() in (2, 3):
            data = input
            unbatched = input.dim() == 2
            batch = 1 if unbatched else input.shape[0 if self.batch_first else 1]
        else:
            return None
        dtype = _autocast_dtype(data)
        if not self._is_ordinary(data, state, weights, batch, unbatched):
            return None
        backend = _select(self._call(dtype, data.device.type))
        if backend == "torch":
            if not beyond_torch:
                return None
            backend = "reference"
        if data.dim() == 3 and self.batch_first:
            data = data.transpose(0, 1)
        return backend, data.reshape(-1, data.shape[-1]), batch_sizes, batch, state, weights, dtype

    def _run(self, backend, rows, batch_sizes, batch, state, weights, dtype, unbatched, resets, lengths, return_cells):
        """All layers: rows (R, I) to the last layer's output (R, D*H'), the final state, and cells (R, D*H) or None."""
        directions, options = 2 if self.bidirectional else 1, self._options
        reverse = [0, 1][:directions]
        cell = self.mode.lower()
        sizes = (self.proj_size or self.hidden_size, self.hidden_size)[: 2 if self.mode == "LSTM" else 1]
        if unbatched:
            state = tuple(part.unsqueeze(1) for part in state)
        state = [_cast(part, dtype) for part in state]
        if not state:
            zeros = [rows.new_zeros(directions, batch, size, dtype=dtype) for size in sizes]
        rows = _cast(rows, dtype)
        finals = []
        for layer in range(self.num_layers):
            first = layer * directions
            if not state:
                initial = zeros
            elif self.num_layers == 1:
                initial = state
            else:
                initial = [part[first : first + directions] for part in state]
            groups = [
                [_cast(weight, dtype) for weight in _by_role(group, self.bias)]
                for group in weights[first : first + directions]
            ]
            if directions == 1:
                merged = groups[0]
            else:
                rows = rows.unsqueeze(1)
                merged = [None if pair[0] is None else torch.stack(pair) for pair in zip(*groups, strict=True)]
            weight_ih, weight_hh, bias_ih, bias_hh, weight_hr = merged
            h0, c0 = (*initial, None)[:2]
            below, extras = rows, None
            if options is not None:
                weight_hh = of_options.recurrent_weight(options, weight_hh, self.training)
                extras = self._extras(layer, initial, rows.shape[0], batch_sizes, resets)
            rows, *final = _run_layer(
                *(backend, cell, rows, weight_ih, bias_ih, weight_hh, bias_hh, weight_hr),
                *(h0, c0, batch_sizes, reverse, self.checkpoint, resets, lengths),
                *(return_cells and layer == self.num_layers - 1, extras),
            )
            finals.append(final)
            if options is not None and options.residual and layer:
                rows = rows + below.view_as(rows)
            if self.dropout and self.training and layer < self.num_layers - 1:
                # over the flat rows: the same mask as torch's from the same seed
                rows = nn.functional.dropout(rows, self.dropout, True)
        cells = finals[-1].pop() if return_cells else None
        if self.num_layers == 1:
            return rows, tuple(finals[0]), cells
        return rows, tuple(torch.cat(parts) for parts in zip(*finals, strict=True)), cells

    def _extras(self, layer: int, state, rows: int, batch_sizes, resets):
        """What the options of one layer add to a call, None for nothing; ``state`` is the layer's, cast as needed."""
        suffixes = ("", "_reverse")[: 2 if self.bidirectional else 1]
        roles = of_options.parameter_sizes(self._options, self.mode, self.hidden_size)
        parameters = {
            role: torch.stack([_cast(getattr(self, f"{role}_l{layer}{suffix}"), state[0].dtype) for suffix in suffixes])
            for role in roles
        }
        return of_options.extras(self._options, parameters, state, rows, batch_sizes, resets, self.training)


def _by_role(group: list[Tensor], bias: bool) -> list[Tensor | None]:
    """weight_ih, weight_hh, bias_ih, bias_hh, weight_hr of one direction, None where absent."""
    weight_ih, weight_hh, *rest = group
    bias_ih, bias_hh = (rest.pop(0), rest.pop(0)) if bias else (None, None)
    return [weight_ih, weight_hh, bias_ih, bias_hh, rest[0] if rest else None]


def _is_packing(batch_sizes, rows: int) -> bool:
    """Whether ``batch_sizes`` is what ``pack_padded_sequence`` makes for that many rows: kernels trust it."""
    if not (
        isinstance(batch_sizes, Tensor)
        and batch_sizes.dtype == torch.int64
        and batch_sizes.dim() == 1
        and batch_sizes.device.type == "cpu"
        and batch_sizes.numel() > 0
    ):
        return False
    return bool((batch_sizes[1:] <= batch_sizes[:-1]).all() & (batch_sizes[-1] > 0) & (batch_sizes.sum() == rows))


def _reject_proj_size(arguments: dict) -> None:
    if "proj_size" in arguments:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
    for name in arguments:
        raise TypeError(f"RNNBase.__init__() got an unexpected keyword argument '{name}'")


class RNN(_Layer):
    """Drop-in for ``torch.nn.RNN``: ``h' = tanh(W_ih x + b_ih + W_hh h + b_hh)``, or relu (Elman 1990).

    Args:
        input_size: features of the input, I.
        hidden_size: features of the hidden state, H.
        num_layers: layers on top of each other.
        nonlinearity: "tanh" or "relu".
        bias: whether there are ``bias_ih`` and ``bias_hh``.
        batch_first: whether input and output are (B, T, .) instead of (T, B, .).
        dropout: probability of dropping an output of every layer but the last, in training.
        bidirectional: whether a second direction reads the input from its end.
        device, dtype: of the parameters.
        checkpoint: in training, keep the state every so many time steps only, and compute what lies between once more
            in the backward pass (Chen et al. 2016): one more forward pass of time, and memory for input, output and
            one such piece. None keeps everything; so do ``torch.compile``, ``torch.func`` and the backend "torch".

    What torch.nn does not have, by keyword only; combinations that have no meaning raise:

        recurrent_dropout: in training, probability of dropping a unit of h where W_hh reads it: one mask a call, layer
            and sequence, the same at all of its time steps (Gal and Ghahramani 2016).
        zoneout: in training, probability that a unit keeps its old state in a time step; in ``eval()`` the share of the
            old state in the new one (Krueger et al. 2017). For the LSTM also a pair, of c and of h; h is made from the
            new c before its zoneout.
        weight_dropout: in training, probability of dropping a weight of W_hh, one mask a call (Merity et al. 2018).
        layer_norm: W_ih x and W_hh h are each normalized over all of their values and scaled by ``weight_ln_ih_l0``,
            ``bias_ln_ih_l0``, ``weight_ln_hh_l0`` and ``bias_ln_hh_l0`` (G*H,), the biases are added after that, and
            the LSTM's c' is normalized before its tanh, by ``weight_ln_c_l0`` and ``bias_ln_c_l0`` (H,) (Ba et al.
            2016, equations 20 to 22). Suffixes are those of the other parameters.
        residual: from the second layer on, a layer's input is added to its output.
        periods: clockwork (Koutník et al. 2014, RNN only): the units in as many equal groups, of which one with period
            p moves in the time steps t with t % p == 0 and reads units of its own or longer periods. t counts from the
            first step of a call's sequence, or its last reset, in both directions.

    Raises:
        ValueError, TypeError, RuntimeError: as ``torch.nn.RNN`` does, with its messages; and for an option of a wrong
            type or range, or one that does not go with another.
    """

    _torch = nn.RNN

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device=None,
        dtype=None,
        *,
        checkpoint: int | None = None,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        weight_dropout: float = 0.0,
        layer_norm: bool = False,
        residual: bool = False,
        periods: tuple[int, ...] | None = None,
        **unknown,
    ) -> None:
        _reject_proj_size(unknown)
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        self.nonlinearity = nonlinearity
        super().__init__(
            f"RNN_{nonlinearity.upper()}",
            *(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional),
            device=device,
            dtype=dtype,
        )
        options = Options(
            recurrent_dropout=recurrent_dropout,
            zoneout=zoneout,
            weight_dropout=weight_dropout,
            layer_norm=layer_norm,
            residual=residual,
            periods=periods,
        )
        self._set_options(options, checkpoint)


class GRU(_Layer):
    """Drop-in for ``torch.nn.GRU`` (Cho et al. 2014, reset gate behind the recurrent product as in cuDNN).

    ``r = σ(..)``, ``z = σ(..)``, ``n = tanh(W_in x + b_in + r ⊙ (W_hn h + b_hn))``, ``h' = (1 - z) ⊙ n + z ⊙
    h``. Arguments, shapes and errors are those of ``fastrnn.RNN`` without ``nonlinearity`` and ``periods``, and

        reset_after: by keyword only; False puts the reset gate before the product, as the textbook has it:
            ``n = tanh(W_in x + b_in + W_hn (r ⊙ h) + b_hn)``. ``fastrnn.load_keras_weights`` maps Keras's weights.
    """

    _torch = nn.GRU

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device=None,
        dtype=None,
        *,
        checkpoint: int | None = None,
        reset_after: bool = True,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        weight_dropout: float = 0.0,
        layer_norm: bool = False,
        residual: bool = False,
        **unknown,
    ) -> None:
        _reject_proj_size(unknown)
        super().__init__(
            "GRU",
            *(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional),
            device=device,
            dtype=dtype,
        )
        options = Options(
            reset_after=reset_after,
            recurrent_dropout=recurrent_dropout,
            zoneout=zoneout,
            weight_dropout=weight_dropout,
            layer_norm=layer_norm,
            residual=residual,
        )
        self._set_options(options, checkpoint)


class LSTM(_Layer):
    """Drop-in for ``torch.nn.LSTM`` (Hochreiter and Schmidhuber 1997; forget gate of Gers et al. 2000).

    ``c' = f ⊙ c + i ⊙ g``, ``h' = o ⊙ tanh(c')``, and with ``proj_size`` P > 0 ``h' = W_hr h'`` of P features
    (Sak et al. 2014). Other arguments, shapes and errors are those of ``fastrnn.RNN`` without ``nonlinearity`` and
    ``periods``; the state is a pair (h, c); and

        peephole: by keyword only; i and f also read c, and o reads c', through the diagonal weights ``weight_ci_l0``,
            ``weight_cf_l0`` and ``weight_co_l0`` (H,) (Gers and Schmidhuber 2000).
    """

    _torch = nn.LSTM

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device=None,
        dtype=None,
        *,
        checkpoint: int | None = None,
        recurrent_dropout: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0,
        weight_dropout: float = 0.0,
        layer_norm: bool = False,
        peephole: bool = False,
        residual: bool = False,
    ) -> None:
        super().__init__(
            "LSTM",
            *(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size),
            device=device,
            dtype=dtype,
        )
        options = Options(
            recurrent_dropout=recurrent_dropout,
            zoneout=zoneout,
            weight_dropout=weight_dropout,
            layer_norm=layer_norm,
            peephole=peephole,
            residual=residual,
        )
        self._set_options(options, checkpoint)

    # torch.nn.LSTM.forward, which runs for calls left to torch, needs these three.
    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args
    permute_hidden = nn.LSTM.permute_hidden


# For every cell the calls of single steps that were prepared for it, by all that they depend on.
_prepared_steps: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class _Cell(RNNCellBase):
    """What the three cells share; ``_torch`` is the torch.nn class that a subclass stands in for."""

    _torch: ClassVar[type[RNNCellBase]]
    _is_lstm: ClassVar[bool] = False
    _weight_names: ClassVar[tuple[str, ...]] = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")

    def _mode(self) -> str:
        return {nn.LSTMCell: "lstm", nn.GRUCell: "gru"}[self._torch]

    def _call(self, dtype: torch.dtype, device: str) -> tuple:
        """The fields of this module's ``dispatch.Call``."""
        return self._mode(), device, dtype, self.input_size, self.hidden_size, 0, 1

    def forward(self, input, hx=None):
        """One step; arguments, results and errors as in torch.nn.

        Args:
            input: (B, I), or (I,) for a single sequence.
            hx: state before the step, (B, H) or (H,); for the LSTM a pair (h, c) of these. Zeros if None.

        Returns:
            The state after the step, laid out as ``hx``.
        """
        if isinstance(input, torch.fx.Proxy):
            return _as_call_module(self, input, hx)
        if hx is not None and not torch.is_grad_enabled() and (final := self._step(input, hx)) is not None:
            return final
        prepared = self._prepare(input, hx)
        if prepared is None:
            return self._torch.forward(self, input, hx)
        backend, state, weights, dtype = prepared
        unbatched = input.dim() == 1
        if not state:
            zeros = input.new_zeros(1, 1 if unbatched else input.shape[0], self.hidden_size, dtype=dtype)
            state = (zeros, zeros)
        else:
            # (H,) to (1, 1, H), (B, H) to (1, B, H)
            state = [_cast(part[None, None] if unbatched else part[None], dtype) for part in state]
        weight_ih, weight_hh, bias_ih, bias_hh = (_cast(weight, dtype) for weight in weights)
        rows = _cast(input, dtype)
        _, *final = _run_layer(
            *(backend, self._mode(), rows[None] if unbatched else rows),
            *(weight_ih, bias_ih, weight_hh, bias_hh, None),
            *(state[0], state[1] if self._is_lstm else None, None, [0]),
        )
        final = [part[0, 0] if unbatched else part[0] for part in final]
        return tuple(final) if self._is_lstm else final[0]

    def _step(self, input, hx):
        """The step of a batch, without gradients, by a call that was prepared before; None if it is no such call.

        A loop over time in Python is made of these: checks that are made once would cost more than the arithmetic.
        """
        state = tuple(hx) if self._is_lstm and isinstance(hx, tuple | list) else (hx,)
        if torch.compiler.is_dynamo_compiling() or len(state) != 1 + self._is_lstm:
            return None
        if dispatch.choice.name not in (None, "numba"):
            return None
        parameters = self._parameters
        weights = [parameters.get(name) for name in self._weight_names]
        tensors = (input, *state)
        if not functional.is_plain((*tensors, *weights)) or torch._C._is_any_autocast_enabled():
            return None
        for tensor, columns in zip(tensors, (self.input_size, self.hidden_size, self.hidden_size), strict=False):
            if tensor is None or tensor.dim() != 2 or tensor.shape[1] != columns or tensor.shape[0] != input.shape[0]:
                return None
            if tensor.dtype is not input.dtype or not tensor.is_cpu or not tensor.is_contiguous() or tensor.is_neg():
                return None
        key = (
            *(self._mode(), input.shape[0], input.dtype, torch.get_num_threads(), dispatch.choice.name),
            *[None if weight is None else (weight.data_ptr(), weight.numel()) for weight in weights],
        )
        prepared = _prepared_steps.setdefault(self, {})
        step = prepared.pop(key, None)  # taken: another thread that calls the same cell prepares its own
        if step is None:
            if not self._is_kernels(input, state, weights):
                return None
            from .kernels.numba_stream import CellStep

            step = CellStep(self._mode(), input.shape[0], weights)
            prepared.clear()  # those for other sizes or former weights
        final = step(*tensors)
        prepared[key] = step
        return final if self._is_lstm else final[0]

    def _is_kernels(self, input, state, weights) -> bool:
        """Whether the kernel for single steps takes a batch's step."""
        if input.numel() == 0 or input.dtype not in (torch.float32, torch.float64):
            return False
        if not self._is_ordinary(input, state, [weight for weight in weights if weight is not None]):
            return False
        gate_size = CELLS[self._mode()].gates * self.hidden_size
        shapes = ((gate_size, self.input_size), (gate_size, self.hidden_size), (gate_size,), (gate_size,))
        for weight, shape in zip(weights, shapes, strict=True):
            if weight is None and (len(shape) == 2 or self.bias):
                return False
            if weight is not None and (weight.shape != shape or not weight.is_contiguous() or weight.is_neg()):
                return False
        return _select(self._call(input.dtype, "cpu")) == "numba"

    def _prepare(self, input, hx):
        """Backend, state, weights and dtype of a call, or None to leave it to torch.nn."""
        state = _state(hx, self._is_lstm)
        weights = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        if state is None or not self._is_ordinary(input, state, weights):
            return None
        dtype = _autocast_dtype(input)
        backend = _select(self._call(dtype, input.device.type))
        return None if backend == "torch" else (backend, state, weights, dtype)

    def _is_ordinary(self, input, state, weights) -> bool:
        """Whether shapes, dtypes and devices are what they should be. Everything else is left to torch.nn."""
        if not isinstance(input, Tensor) or input.dim() not in (1, 2) or input.numel() == 0:
            return False
        if input.shape[-1] != self.input_size:
            return False
        expected = (*input.shape[:-1], self.hidden_size)
        autocast = _autocast_is_on(input)
        return all(part.shape == expected and _fits(part, input, autocast) for part in state) and all(
            weight is None or _fits(weight, input, autocast) for weight in weights
        )


class RNNCell(_Cell):
    """Drop-in for ``torch.nn.RNNCell``: one step of ``fastrnn.RNN``.

    Args:
        input_size: features of the input, I.
        hidden_size: features of the hidden state, H.
        bias: whether there are ``bias_ih`` and ``bias_hh``.
        nonlinearity: "tanh" or "relu".
        device, dtype: of the parameters.

    Raises:
        ValueError, RuntimeError: as ``torch.nn.RNNCell`` does, with its messages.
    """

    __constants__: ClassVar[list[str]] = nn.RNNCell.__constants__
    _torch = nn.RNNCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity

    def _mode(self) -> str:
        return f"rnn_{self.nonlinearity}"

    def _is_ordinary(self, input, state, weights) -> bool:
        return self.nonlinearity in ("tanh", "relu") and super()._is_ordinary(input, state, weights)


class GRUCell(_Cell):
    """Drop-in for ``torch.nn.GRUCell``: one step of ``fastrnn.GRU``; arguments as ``fastrnn.RNNCell``'s."""

    _torch = nn.GRUCell

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, device=None, dtype=None) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)


class LSTMCell(_Cell):
    """Drop-in for ``torch.nn.LSTMCell``: one step of ``fastrnn.LSTM``; arguments as ``fastrnn.RNNCell``'s."""

    _torch = nn.LSTMCell
    _is_lstm = True

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, device=None, dtype=None) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)
