"""A layer whose step is not torch.nn's, as an autograd Function over a kernel.

Where that cannot run (another backend, a projection of the state, a tracer, a transform or ``torch.compile`` that looks
on), the whole layer is ``reference.layer``.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from . import dispatch, reference
from .reference import CELLS, Extras


def _without_autocast(tensor: Tensor):
    """No autocast: the caller has chosen the dtype, and a state is kept in float32 from step to step."""
    device = tensor.device.type
    if torch._C._is_any_autocast_enabled() and torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


class _Config(NamedTuple):
    cell: str
    reset_after: bool
    reverse: tuple[int, ...]


class Recurrence(Function):
    """(config, batch_sizes, resets, *masks, x, *parameters, h0, c0) -> output, h_n, c_n."""

    @staticmethod
    def forward(ctx, config, batch_sizes, resets, recurrent_mask, keep_hidden, keep_cell, x, *tensors):
        kernels = dispatch.recurrence_kernels()
        *parameters, h0, c0 = tensors
        masks = kernels.Masks(recurrent_mask, keep_hidden, keep_cell)
        arguments = x, kernels.Parameters(*parameters), masks, h0, c0, batch_sizes, config.reverse, resets
        output, h_n, c_n, reserve = kernels.forward(config.cell, config.reset_after, *arguments, True)
        ctx.config = config
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(batch_sizes, resets, *masks, x, *tensors, *reserve)
        if c_n is None:
            c_n = h_n.new_empty(0)
            ctx.mark_non_differentiable(c_n)
        return output, h_n, c_n

    @staticmethod
    def backward(ctx, *cotangents):
        saved = ctx.saved_tensors  # once: torch.utils.checkpoint unpacks a tensor only once
        with _without_autocast(saved[5]):
            return (None,) * 6 + tuple(Recurrence._gradients(ctx, saved, cotangents))

    @staticmethod
    def _gradients(ctx, saved, cotangents):
        from .functional import are_plain, is_last_use

        needs_x, *needs, _, _ = ctx.needs_input_grad[6:]
        if all(cotangent is None for cotangent in cotangents):
            return [None] * (3 + len(needs))
        kernels, config = dispatch.recurrence_kernels(), ctx.config
        batch_sizes, resets, *tensors = saved
        masks, (x, *tensors) = kernels.Masks(*tensors[:3]), tensors[3:]
        inputs, reserve = tensors[: len(needs) + 2], kernels.Reserve(*tensors[len(needs) + 2 :])
        if torch.is_grad_enabled() or not are_plain(cotangents):
            return _differentiable_gradients(config, batch_sizes, resets, masks, (x, *inputs), cotangents)
        *parameters, h0, _ = inputs
        dx, d_parameters, dh0, dc0 = kernels.backward(
            *(config.cell, config.reset_after, *cotangents, x, kernels.Parameters(*parameters), masks, reserve),
            *(h0.shape[1], batch_sizes, config.reverse, resets, needs_x, kernels.Parameters(*needs)),
            is_last_use(reserve.gates, *cotangents),
        )
        return dx, *d_parameters, dh0, dc0


def _differentiable_gradients(config, batch_sizes, resets, masks, inputs, cotangents):
    """The gradients of ``Recurrence``'s inputs as operations that have derivatives: through the reference."""
    from .functional import vector_jacobian_product

    names = ("x", *dispatch.recurrence_kernels().Parameters._fields, "h0", "c0")
    given = {name: tensor for name, tensor in zip(names, inputs, strict=True) if tensor is not None}
    d_results = {name: d for name, d in zip(_RESULTS, cotangents, strict=True) if d is not None}

    def layer(given: dict[str, Tensor]) -> dict[str, Tensor]:
        own = [given.get(name) for name in _OF_TORCH]
        further = {name: tensor for name, tensor in given.items() if name not in _OF_TORCH}
        extras = Extras(config.reset_after, **further, **masks._asdict())
        results = reference.layer(config.cell, *own, batch_sizes, config.reverse, resets, extras=extras)
        results = dict(zip(_RESULTS, results, strict=False))
        return {name: results[name] for name in d_results}

    gradients = vector_jacobian_product(layer, given, d_results)
    return [gradients.get(name) for name in names]


_RESULTS = ("output", "h_n", "c_n")
# The tensors of a layer as torch.nn has it.
_OF_TORCH = ("x", "weight_ih", "bias_ih", "weight_hh", "bias_hh", "weight_hr", "h0", "c0")


def _has_kernel(backend: str, inputs, batch_sizes, resets, extras: Extras) -> bool:
    from .functional import is_plain

    return (
        backend == "numba"
        and inputs.weight_hr is None
        and inputs.x.shape[0] > 0
        and (batch_sizes is None or resets is None)
        and torch.autograd.forward_ad._current_level < 0
        and is_plain((*inputs, *extras[1:]))
    )


def layer(
    backend: str, cell: str, inputs, batch_sizes, reverse, resets, lengths, cells: bool, extras: Extras
) -> tuple[Tensor, ...]:
    """``functional.layer`` with extras; ``inputs`` are its tensors with their dimension of groups."""
    with _without_autocast(inputs.x):
        # the kernels give no cell states
        if cells or not _has_kernel(backend, inputs, batch_sizes, resets, extras):
            results = reference.layer(cell, *inputs, batch_sizes, reverse, resets, lengths, extras)
            return results if cells else results[: 2 + CELLS[cell].has_cell_state]
        dtype = inputs.x.dtype
        if dtype in (torch.bfloat16, torch.float16):
            inputs = type(inputs)(*(None if tensor is None else tensor.float() for tensor in inputs))
            extras = extras.map(Tensor.float)
        kernels = dispatch.recurrence_kernels()
        further = (getattr(extras, name) for name in kernels.Parameters._fields[4:])
        parameters = kernels.Parameters(*inputs[1:5], *further)
        masks = kernels.Masks(extras.recurrent_mask, extras.keep_hidden, extras.keep_cell)
        config = _Config(cell, extras.reset_after, tuple(reverse))
        tensors = (inputs.x, *parameters, inputs.h0, inputs.c0)
        if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
            results = Recurrence.apply(config, batch_sizes, resets, *masks, *tensors)
        else:
            arguments = inputs.x, parameters, masks, inputs.h0, inputs.c0, batch_sizes, config.reverse, resets
            results = kernels.forward(cell, extras.reset_after, *arguments, False)
        results = results[: 2 + CELLS[cell].has_cell_state]
        return tuple(result.to(dtype) for result in results)
