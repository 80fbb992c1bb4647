"""A layer whose step is not torch.nn's: its projection as torch operations, its time loop by a kernel.

``Recurrence`` is that time loop as an autograd Function. Where it cannot run (another backend, a projection of the
state, a tracer, a transform or ``torch.compile`` that looks on), the whole layer is ``reference.layer``, whose
operations these take apart themselves.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import layer_norm, linear

from . import dispatch, reference
from .reference import CELLS, EPSILON, Extras

# Rows of one product with the input's weights.
LINEAR_ROWS = 128


def _without_autocast(tensor: Tensor):
    """No autocast: the caller has chosen the dtype, and a state is kept in float32 from step to step."""
    device = tensor.device.type
    if torch._C._is_any_autocast_enabled() and torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def _sum(*terms: Tensor | None) -> Tensor | None:
    there = [term for term in terms if term is not None]
    return sum(there[1:], there[0]) if there else None


def _split_bias(cell: str, inputs, extras: Extras) -> tuple[Tensor | None, Tensor | None]:
    """All constants of the gates (D, G*H), and of those what r acts on in the GRU's n (D, H)."""
    hidden_side = _sum(inputs.bias_hh, extras.bias_ln_hh)
    if cell == "gru" and extras.reset_after and hidden_side is not None:
        of_n = hidden_side[:, hidden_side.shape[1] // 3 * 2 :]
        hidden_side = torch.cat([hidden_side[:, : hidden_side.shape[1] // 3 * 2], torch.zeros_like(of_n)], 1)
        return _sum(inputs.bias_ih, hidden_side, extras.bias_ln_ih), of_n
    return _sum(inputs.bias_ih, hidden_side, extras.bias_ln_ih), None


def _gates_x(inputs, bias: Tensor | None, extras: Extras) -> Tensor:
    """The input's share of the gates, with ``bias``, (rows, D, G*H)."""
    groups, sources = inputs.weight_ih.shape[0], inputs.x.shape[1]
    shares = []
    for group in range(groups):
        x, own = inputs.x[:, group * sources // groups], None if bias is None else bias[group]
        if extras.weight_ln_ih is None:
            shares.append(_linear_in_parts(x, inputs.weight_ih[group], own))
        else:
            product = _linear_in_parts(x, inputs.weight_ih[group], None)
            normalized = layer_norm(product, product.shape[1:], eps=EPSILON)
            # scaled apart: layer_norm adds up the gradients of its scale and shift one row after the other, in as many
            # parts as there are threads
            shares.append(torch.addcmul(own, normalized, extras.weight_ln_ih[group]))
    return shares[0].unsqueeze(1) if groups == 1 else torch.stack(shares, 1)


def _linear_in_parts(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``linear``, whose weights' gradient is added up in parts: one float32 sum over all rows is less exact."""
    if x.dtype == torch.float64 or not weight.requires_grad or len(x) <= LINEAR_ROWS:
        return linear(x, weight, bias)
    return torch.cat([linear(part, weight, bias) for part in x.split(LINEAR_ROWS)])


class _Config(NamedTuple):
    cell: str
    reset_after: bool
    reverse: tuple[int, ...]


class Recurrence(Function):
    """(config, batch_sizes, resets, *masks, gates_x, *parameters, h0, c0) -> output, h_n, c_n."""

    @staticmethod
    def forward(ctx, config, batch_sizes, resets, recurrent_mask, keep_hidden, keep_cell, gates_x, *tensors):
        kernels = dispatch.recurrence_kernels()
        *parameters, h0, c0 = tensors
        parameters, masks = kernels.Parameters(*parameters), kernels.Masks(recurrent_mask, keep_hidden, keep_cell)
        arguments = gates_x, parameters, masks, h0, c0, batch_sizes, config.reverse, resets
        output, h_n, c_n, reserve = kernels.forward(config.cell, config.reset_after, *arguments, True)
        ctx.config = config
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(batch_sizes, resets, *masks, gates_x, *parameters, h0, c0, *reserve)
        if c_n is None:
            c_n = h_n.new_empty(0)
            ctx.mark_non_differentiable(c_n)
        return output, h_n, c_n

    @staticmethod
    def backward(ctx, *cotangents):
        with _without_autocast(ctx.saved_tensors[5]):
            return Recurrence._gradients(ctx, cotangents)

    @staticmethod
    def _gradients(ctx, cotangents):
        from .functional import are_plain

        nothing = (None,) * 6
        if all(cotangent is None for cotangent in cotangents):
            return (*nothing, *(None,) * (len(ctx.needs_input_grad) - 6))
        kernels, config = dispatch.recurrence_kernels(), ctx.config
        batch_sizes, resets, *tensors = ctx.saved_tensors
        count = len(kernels.Parameters._fields)
        masks, gates_x, parameters = (
            kernels.Masks(*tensors[:3]),
            tensors[3],
            kernels.Parameters(*tensors[4 : 4 + count]),
        )
        h0, c0, *reserve = tensors[4 + count :]
        if torch.is_grad_enabled() or not are_plain(cotangents):
            inputs = (gates_x, *parameters, h0, c0)
            return *nothing, *_differentiable_gradients(config, batch_sizes, resets, masks, inputs, cotangents)
        d_gates_x, d_parameters, dh0, dc0 = kernels.backward(
            *(config.cell, config.reset_after, *cotangents, parameters, masks, kernels.Reserve(*reserve)),
            *(h0.shape[1], batch_sizes, config.reverse, resets),
        )
        return *nothing, d_gates_x, *d_parameters, dh0, dc0


def _differentiable_gradients(config, batch_sizes, resets, masks, inputs, cotangents):
    """The gradients of ``Recurrence``'s inputs as operations that have derivatives: through the reference."""
    from .functional import vector_jacobian_product

    names = ("gates_x", *_parameter_names(), "h0", "c0")
    given = {name: tensor for name, tensor in zip(names, inputs, strict=True) if tensor is not None}
    d_results = {name: d for name, d in zip(("output", "h_n", "c_n"), cotangents, strict=True) if d is not None}

    def loop(given: dict[str, Tensor]) -> dict[str, Tensor]:
        results = _reference_loop(config, batch_sizes, resets, masks, *(given.get(name) for name in names))
        results = dict(zip(("output", "h_n", "c_n"), results, strict=True))
        return {name: results[name] for name in d_results}

    gradients = vector_jacobian_product(loop, given, d_results)
    return [gradients.get(name) for name in names]


def _parameter_names() -> tuple[str, ...]:
    return dispatch.recurrence_kernels().Parameters._fields


def _reference_loop(config, batch_sizes, resets, masks, gates_x, *tensors):
    """What ``Recurrence`` computes, in plain torch operations."""
    *parameters, h0, c0 = tensors
    weight_hh, bias_hn, *further = parameters
    extras = Extras(config.reset_after, **dict(zip(_parameter_names()[2:], further, strict=True)), **masks._asdict())
    bias_hh = None
    if bias_hn is not None:
        bias_hh = torch.cat([torch.zeros_like(bias_hn), torch.zeros_like(bias_hn), bias_hn], 1)
    batch = h0.shape[1]
    sizes = [batch] * (len(gates_x) // batch) if batch_sizes is None else batch_sizes.tolist()
    results = [
        reference.recur(
            *(CELLS[config.cell].step, gates_x[:, group], weight_hh[group]),
            *(None if bias_hh is None else bias_hh[group], None, h0[group], None if c0 is None else c0[group]),
            *(sizes, backwards, None if resets is None else resets[:, group], None, extras.group(group)),
        )[:3]
        for group, backwards in enumerate(config.reverse)
    ]
    outputs, hiddens, cells = zip(*results, strict=True)
    return torch.cat(outputs, -1), torch.stack(hiddens), None if c0 is None else torch.stack(cells)


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
        bias, bias_hn = _split_bias(cell, inputs, extras)
        gates_x = _gates_x(inputs, bias, extras)
        further = (getattr(extras, name) for name in kernels.Parameters._fields[2:])
        parameters = kernels.Parameters(inputs.weight_hh, bias_hn, *further)
        masks = kernels.Masks(extras.recurrent_mask, extras.keep_hidden, extras.keep_cell)
        config = _Config(cell, extras.reset_after, tuple(reverse))
        tensors = (gates_x, *parameters, inputs.h0, inputs.c0)
        if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
            results = Recurrence.apply(config, batch_sizes, resets, *masks, *tensors)
        else:
            arguments = gates_x, parameters, masks, inputs.h0, inputs.c0, batch_sizes, config.reverse, resets
            results = kernels.forward(cell, extras.reset_after, *arguments, False)
        results = results[: 2 + CELLS[cell].has_cell_state]
        return tuple(result.to(dtype) for result in results)
