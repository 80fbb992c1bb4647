"""Streaming inference: one time step a call, with the state kept in between."""

from __future__ import annotations

import torch
from torch import Tensor, empty_like, get_num_threads, nn
from torch._C import _is_any_autocast_enabled as is_any_autocast_enabled

from . import dispatch
from .dispatch import choice
from .modules import _Layer
from .reference import CELLS

State = Tensor | tuple[Tensor, Tensor]


class Stream:
    """Runs a recurrent module one time step at a time and carries its state.

    ``stream.step(x_t)`` for t = 0, 1, ... gives the rows of ``module(x)[0]``, computed as in ``eval()`` mode (no
    dropout) and without gradients. The weights are the module's own: nothing is copied, and a change to them, in place
    or by new parameters, counts from the next step on.

    Args:
        module: ``fastrnn.RNN``, ``GRU`` or ``LSTM``, of any number of layers and one direction.
        batch_size: how many sequences run side by side, B.

    Raises:
        TypeError: the module is no layer of fastrnn.
        ValueError: it is bidirectional, has periods, or batch_size is no positive number.

    Example:
        >>> stream = fastrnn.Stream(fastrnn.GRU(16, 64))
        >>> for frame in frames:  # (16,) each
        ...     y = stream.step(frame)  # (64,)
    """

    def __init__(self, module: nn.Module, batch_size: int = 1):
        if not isinstance(module, _Layer):
            raise TypeError(
                f"fastrnn.Stream runs fastrnn.RNN, GRU and LSTM, got {type(module).__name__}; "
                "fastrnn.convert turns torch.nn's layers into these"
            )
        if module.bidirectional:
            raise ValueError("a bidirectional module needs the whole sequence before it can give the first output")
        if module._options is not None and module._options.periods is not None:
            raise ValueError("the clock of a module with periods begins anew in every call: run whole sequences")
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise ValueError(f"batch_size should be a positive whole number, got {batch_size!r}")
        self.module = module
        self.batch_size = batch_size
        # What the fast path calls: (a step, the buffer for its output) for the inner layers, then a step.
        self._inner: list = []
        self._last = None
        self._hx: tuple[Tensor, ...] = ()  # (num_layers, B, H'), for the LSTM also (num_layers, B, H)
        self.reset()

    def step(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Run the next time step of every sequence.

        Args:
            x: (B, I), or (I,) where B = 1; of the weights' dtype, on their device.
            out: where to write the result, contiguous, of its shape and dtype; then nothing is allocated.

        Returns:
            The last layer's hidden state (B, H'), or (H',) for x (I,): new memory, or ``out``.

        Raises:
            ValueError: x or ``out`` is of another shape, or ``out`` of another dtype.
            RuntimeError, ValueError: what the module raises for x otherwise. The state stays as it was.
        """
        if not self._is_prepared(x) and not self._prepare(x):
            return self._step_of_module(x, out)
        like = self._likes[x.shape]
        if out is None:
            out = empty_like(like)
        else:
            _check_out(out, like)
            if out.is_neg():  # its memory holds other numbers
                return out.copy_(self.step(x))
            if x.data_ptr() == out.data_ptr():
                x = x.clone()
        source = x.data_ptr()
        for run, buffer in self._inner:
            target = buffer.data_ptr()
            run(source, target)
            source = target
        self._last(source, out.data_ptr())
        return out

    def reset(self, mask: Tensor | None = None) -> None:
        """Set the state to zero: of all sequences, or of those where ``mask``, bool (B,), is True.

        Raises:
            ValueError: the mask is of another shape or dtype.
        """
        if mask is None:
            self.state = None
            return
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (self.batch_size,):
            given = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"mask should be a bool tensor of shape ({self.batch_size},), got {given}")
        self._set([part.masked_fill(mask.to(part.device)[:, None], 0) for part in self._settled()])

    @property
    def state(self) -> State:
        """A copy of the state as the module takes it: h (num_layers, B, H'), for an LSTM (h, c).

        Assign such a state, or None for zeros, to go on from there.
        """
        copies = tuple(part.clone() for part in self._settled())
        return copies if self.module.mode == "LSTM" else copies[0]

    @state.setter
    @torch.inference_mode(False)
    def state(self, hx: State | None) -> None:
        module = self.module
        is_lstm = module.mode == "LSTM"
        sizes = (module.proj_size or module.hidden_size, module.hidden_size)[: 2 if is_lstm else 1]
        shapes = [(module.num_layers, self.batch_size, size) for size in sizes]
        weight = module.weight_ih_l0
        if hx is None:
            parts = [torch.zeros(shape, dtype=weight.dtype, device=weight.device) for shape in shapes]
        else:
            parts = list(hx) if is_lstm and isinstance(hx, tuple | list) else [hx]
            given = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
            if given != shapes:
                raise ValueError(f"the state should have the shapes {shapes}, got {given}")
            parts = [part.detach().to(weight, copy=True).contiguous() for part in parts]
        self._set(parts)

    def __getstate__(self) -> dict:
        hx = self._settled()
        return {"module": self.module, "batch_size": self.batch_size, "_hx": hx, "_inner": [], "_last": None}

    def _settled(self) -> tuple[Tensor, ...]:
        """``_hx``, after the fast path has brought the state there: where it may be read and, by ``_set``, changed."""
        if self._last is not None:
            for step in (*(step for step, _ in self._inner), self._last):
                step.settle()
        return self._hx

    def _set(self, parts: list[Tensor]) -> None:
        if self._last is None:
            self._hx = tuple(parts)
            return
        for part, new in zip(self._settled(), parts, strict=True):
            part.copy_(new)

    def _weights(self) -> dict[str, Tensor] | None:
        """The module's weights by name; None if some are computed anew whenever they are asked for."""
        parameters = self.module._parameters
        names = self.module._flat_weights_names
        if any(parameters.get(name) is None for name in names):
            return None
        return {name: parameters[name] for name in names}

    def _is_prepared(self, x: Tensor) -> bool:
        """Whether the fast path was prepared for such an x and for all as it is now: what every step has to ask."""
        if self._last is None or type(x) is not Tensor or x.dtype is not self._dtype or not x.is_cpu:
            return False
        if x.shape not in self._likes or not x.is_contiguous() or x.is_neg():
            return False
        parameters = self._parameters
        for name, pointer, count in self._pointers:
            weight = parameters.get(name)
            if weight is None or weight.data_ptr() != pointer or weight.numel() != count:
                return False
        return (
            choice.name == self._backend
            and get_num_threads() == self._threads
            and not is_any_autocast_enabled()
            and parameters is self.module._parameters
        )

    def _check_shape(self, x: Tensor) -> None:
        shapes = [(self.batch_size, self.module.input_size)]
        if self.batch_size == 1:
            shapes.append((self.module.input_size,))
        if not isinstance(x, Tensor) or tuple(x.shape) not in shapes:
            given = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x should have the shape {' or '.join(map(str, shapes))}, got {given}")

    @torch.inference_mode(False)  # what is kept must be of use outside that mode too
    def _prepare(self, x: Tensor) -> bool:
        """Prepare the fast path for all as it is now, if it can take x; raises ValueError for x of a wrong shape."""
        self._check_shape(x)
        hx = self._settled()
        self._inner, self._last = [], None
        module, weights, dtype = self.module, self._weights(), x.dtype
        if weights is None or type(module).forward is not _Layer.forward or is_any_autocast_enabled():
            return False
        if module._options is not None:
            return False
        if dtype not in (torch.float32, torch.float64) or not _is_as_kernels_take(x, dtype, x.shape):
            return False
        groups, batch, size = module._groups(), self.batch_size, module.proj_size or module.hidden_size
        gate_size = CELLS[module.mode.lower()].gates * module.hidden_size
        for layer, group in enumerate(groups):
            columns = size if layer else module.input_size
            shapes = ((gate_size, columns), (gate_size, size), (gate_size,), (gate_size,), (size, module.hidden_size))
            pairs = zip(group, shapes, strict=True)
            if not all(weight is None or _is_as_kernels_take(weight, dtype, shape) for weight, shape in pairs):
                return False
        if dispatch.select(dispatch.Call(*module._call(dtype, "cpu"))).backend != "numba":
            return False
        from .kernels.numba_stream import Step

        self._hx = tuple(part.to(dtype, copy=True) for part in hx)
        steps = [
            Step(module.mode.lower(), group, *(*(part[layer : layer + 1] for part in self._hx), None)[:2])
            for layer, group in enumerate(groups)
        ]
        buffers = [torch.empty(batch, size, dtype=dtype, device="cpu") for _ in steps]
        *self._inner, (self._last, like) = zip(steps, buffers, strict=True)
        # what a result is like, by the shapes that x may have
        self._likes = {(batch, module.input_size): like}
        if batch == 1:
            self._likes[(module.input_size,)] = like[0]
        self._dtype = dtype
        self._parameters = module._parameters
        self._pointers = [(name, weight.data_ptr(), weight.numel()) for name, weight in weights.items()]
        self._threads, self._backend = get_num_threads(), choice.name
        return True

    @torch.no_grad()
    def _step_of_module(self, x: Tensor, out: Tensor | None) -> Tensor:
        """A step through the module's own ``forward``: right for whatever that takes."""
        module = self.module
        rows = x if x.dim() == 2 else x[None]
        training = module.training
        module.training = False  # no dropout between the layers
        try:
            hx = tuple(part.to(module.weight_ih_l0) for part in self._hx)
            output, final = module(
                rows.unsqueeze(1 if module.batch_first else 0), hx if module.mode == "LSTM" else hx[0]
            )
        finally:
            module.training = training
        result = output.reshape(-1, output.shape[-1]) if x.dim() == 2 else output.reshape(-1)
        if out is not None:
            _check_out(out, result)
            result = out.copy_(result)
        self._hx = tuple(part.contiguous() for part in final) if module.mode == "LSTM" else (final.contiguous(),)
        return result


def _is_as_kernels_take(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether a kernel may read a tensor's memory as numbers of ``dtype`` in rows of ``shape``."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.is_cpu
        and tensor.dtype == dtype
        and tensor.shape == shape
        and tensor.layout == torch.strided
        and tensor.is_contiguous()
        and not tensor.is_neg()
    )


def _check_out(out: Tensor, like: Tensor) -> None:
    if (
        not isinstance(out, Tensor)
        or out.shape != like.shape
        or out.dtype != like.dtype
        or out.device != like.device
        or not out.is_contiguous()
    ):
        given = type(out).__name__
        if isinstance(out, Tensor):
            layout = "contiguous" if out.is_contiguous() else "non-contiguous"
            given = f"a {layout} {out.dtype} one of {tuple(out.shape)} on {out.device}"
        raise ValueError(
            f"out should be a contiguous {like.dtype} tensor of shape {tuple(like.shape)} on {like.device}, got {given}"
        )
