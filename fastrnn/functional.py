"""One layer: input projection, time loop and back-propagation through time, as autograd Functions.

The structure is the smallest that is right for first and second derivatives, ``torch.func`` transforms and
``torch.compile`` alike:

* ``Scan`` runs the fused layer and keeps the activated gates.
* ``ScanBackward`` turns the gradients of the results into those of the inputs with the fused backward pass. It is a
  Function of its own so that it can be differentiated: its backward goes through ``reference.layer`` twice.
* ``ScanCheckpointed`` runs the sequence piece by piece, keeps the state before each, and runs a piece once more when
  its gradient is due: memory for the gates of one piece, not of all steps.
* ``ScanTransformed`` and ``ScanBackwardTransformed`` are the same two with the extra methods that functorch asks
  for. They cost more per call and are used only while a transform is active. Their ``vmap`` folds a mapped
  dimension into the batch, or, where the weights are mapped too, into the groups.

Results of a Function never alias and are never views, so that they may be changed in place.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from . import ops, recurrence, reference
from .reference import CELLS, Extras


class _Config(NamedTuple):
    """What a Function needs besides tensors."""

    backend: str
    cell: str
    reverse: tuple[int, ...]
    # Number of interleaved examples whose weight gradients are kept apart: example e of row r is at r * examples + e.
    examples: int = 1
    # Which of the inputs need a gradient, in the order of _Inputs.
    needs: tuple[bool, ...] = ()
    # Whether the cell state after every step is a result as well.
    cells: bool = False


class _Inputs(NamedTuple):
    """The tensors of a layer, in the order of ``layer``'s arguments; x and the weights may lack their dimension D."""

    x: Tensor
    weight_ih: Tensor
    bias_ih: Tensor | None
    weight_hh: Tensor
    bias_hh: Tensor | None
    weight_hr: Tensor | None
    h0: Tensor
    c0: Tensor | None


def _grouped(inputs: _Inputs) -> _Inputs:
    """The inputs with their dimension of groups, which one group may lack: views would cost more than small kernels."""
    if inputs.x.dim() == 3:
        return inputs
    weights = (None if weight is None else weight.unsqueeze(0) for weight in inputs[1:6])
    return _Inputs(inputs.x.unsqueeze(1), *weights, inputs.h0, inputs.c0)


def is_plain(tensors) -> bool:
    """Whether nobody looks at operators and all tensors are ordinary, so that kernels may be called directly."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and not torch.jit.is_tracing()
        and all(tensor is None or type(tensor) is Tensor or type(tensor) is Parameter for tensor in tensors)
    )


def _scan(
    config: _Config, batch_sizes: Tensor | None, resets: Tensor | None, inputs: _Inputs, save: bool
) -> tuple[Tensor, ...]:
    if is_plain(inputs):
        with torch.no_grad():
            return ops.layer_forward_on(
                config.backend, config.cell, *inputs, batch_sizes, config.reverse, save, resets, config.cells
            )
    # past the operator's own derivative, which would cost 10 µs and do nothing here
    with torch._C._AutoDispatchBelowAutograd():
        results = ops.layer_forward(
            config.backend, config.cell, *inputs, batch_sizes, config.reverse, save, resets, config.cells
        )
        return results if config.cells else results[:6]


def _scan_backward(
    config, batch_sizes, resets, d_output, d_h_n, d_c_n, d_cells, gates, hidden_prev, cell_prev, inputs, overwrite=False
):
    """Gradients of the inputs, in the order of _Inputs; those of weights and biases per example: (examples, ...).

    ``overwrite``: nobody will read the reserve again.
    """
    x, weight_ih, bias_ih, weight_hh, bias_hh, weight_hr, h0, c0 = inputs
    there = (True, True, bias_ih is not None, True, bias_hh is not None, weight_hr is not None)
    needs = [needed and given for needed, given in zip(config.needs, there, strict=False)]
    arguments = (
        *(config.backend, config.cell, d_output, d_h_n, d_c_n, gates, hidden_prev, cell_prev),
        *(x, weight_ih, weight_hh, weight_hr, h0.shape[1], batch_sizes, config.reverse, config.examples, needs),
        *(resets, d_cells),
    )
    if overwrite:
        *gradients, dh0, dc0 = ops.layer_backward_on(*arguments, overwrite=True)
    else:
        *gradients, dh0, dc0 = ops.layer_backward(*arguments)
    gradients = [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)]
    return *gradients, dh0, None if c0 is None else dc0


class Scan(Function):
    """(config, batch_sizes, resets, *inputs) -> output, h_n, c_n, the reserve: gates, hidden_prev, cell_prev; cells."""

    @staticmethod
    def forward(ctx, config, batch_sizes, resets, *inputs):
        results = _scan(config, batch_sizes, resets, _grouped(_Inputs(*inputs)), save=True)
        Scan.keep(ctx, (config, batch_sizes, resets, *inputs), results)
        return results

    @staticmethod
    def keep(ctx, inputs, output):
        config, batch_sizes, resets, *tensors = inputs
        c_n, reserve = output[2], output[3:6]
        ctx.config = config
        ctx.set_materialize_grads(False)
        has_cell_state = CELLS[config.cell].has_cell_state
        ctx.mark_non_differentiable(*reserve, *(() if has_cell_state else (c_n,)))
        ctx.save_for_backward(batch_sizes, resets, *reserve, *tensors)

    @staticmethod
    def backward(ctx, d_output, d_h_n, d_c_n, *others):
        d_cells = others[3] if ctx.config.cells else None
        return (None, None, None, *_layer_gradients(ctx, d_output, d_h_n, d_c_n, d_cells))


def are_plain(cotangents) -> bool:
    """Whether incoming gradients are ordinary tensors: those of ``is_grads_batched=True`` only look so."""
    return is_plain(cotangents) and not any(
        cotangent is not None and torch._C._functorch.is_legacy_batchedtensor(cotangent) for cotangent in cotangents
    )


def is_last_use(gates: Tensor, *cotangents: Tensor | None) -> bool:
    """Whether this backward pass is plain and the graph is freed after it: then its reserve may be overwritten."""
    keeps = torch._C._autograd._get_current_graph_task_keep_graph()
    return not keeps and is_plain((gates,)) and are_plain(cotangents)


def _layer_gradients(ctx, d_output, d_h_n, d_c_n, d_cells):
    """The gradients of a layer's inputs from what ``Scan`` saved, in the cheapest way that the moment allows."""
    batch_sizes, resets, gates, hidden_prev, cell_prev, *inputs = ctx.saved_tensors
    if d_output is None and d_h_n is None and d_c_n is None and d_cells is None:
        return [None] * len(inputs)
    config = ctx.config._replace(needs=tuple(ctx.needs_input_grad[3:]))
    if not CELLS[config.cell].has_cell_state:
        cell_prev = None
    arguments = (d_output, d_h_n, d_c_n, d_cells, gates, hidden_prev, cell_prev)
    grouped = inputs[0].dim() == 3
    inputs = _grouped(_Inputs(*inputs))
    if torch._C._are_functorch_transforms_active():
        gradients = ScanBackwardTransformed.apply(config, batch_sizes, resets, *arguments, *inputs)
    elif torch.is_grad_enabled():
        gradients = ScanBackward.apply(config, batch_sizes, resets, *arguments, *inputs)
    else:
        last_use = is_last_use(gates, d_output, d_h_n, d_c_n) and (d_cells is None or are_plain((d_cells,)))
        gradients = _scan_backward(config, batch_sizes, resets, *arguments, inputs, last_use)
    return _as_given(_of_the_only_example(gradients), grouped)


def _as_given(gradients, grouped: bool):
    """Gradients of inputs that came with their dimension of groups, or without it."""
    if grouped:
        return gradients
    dx, *weights = gradients[:6]
    weights = (None if weight is None else weight[0] for weight in weights)
    return [None if dx is None else dx.squeeze(1), *weights, *gradients[6:]]


def _of_the_only_example(gradients):
    """Weights' and biases' gradients without their dimension of examples, where there is one example."""
    return [
        gradient if gradient is None or name not in _PER_EXAMPLE else gradient[0]
        for name, gradient in zip(_Inputs._fields, gradients, strict=True)
    ]


def _without_views(tensors):
    """The same tensors as no views: a Function's result that is one could not be changed in place."""
    return tuple(tensor if tensor is None else torch.ops.aten._unsafe_view(tensor, tensor.shape) for tensor in tensors)


class _Piece(NamedTuple):
    """Some time steps of a layer, as rows and as a packing of their own."""

    begin: int
    end: int
    batch_sizes: Tensor | None


def _pieces(rows: int, batch: int, batch_sizes: Tensor | None, steps: int) -> list[_Piece]:
    """The rows of a layer cut after every ``steps`` time steps, in the order of time."""
    if batch_sizes is None:
        bounds = [*range(0, rows, steps * batch), rows]
        sizes = [None] * len(bounds)
    else:
        sizes = batch_sizes.split(steps)
        bounds = [0, *torch.stack([part.sum() for part in sizes]).cumsum(0).tolist()]
    return [_Piece(*slot) for slot in zip(bounds, bounds[1:], sizes, strict=False)]


def _directions(config: _Config, inputs: _Inputs) -> list[tuple[slice, _Config, _Inputs]]:
    """The groups that walk the same way, which can go through pieces of time together, and what is theirs."""
    backwards = config.reverse
    alike = len(set(backwards)) == 1
    together = [slice(0, len(backwards))] if alike else [slice(d, d + 1) for d in range(len(backwards))]
    parts = []
    for groups in together:
        own = [None if tensor is None else tensor[groups] for tensor in inputs[1:]]
        shared = inputs.x.shape[1] < len(backwards)
        x = inputs.x if shared else inputs.x[:, groups]
        parts.append((groups, config._replace(reverse=backwards[groups]), _Inputs(x, *own)))
    return parts


class ScanCheckpointed(Function):
    """(config, batch_sizes, resets, steps, *inputs) -> output, h_n, c_n, cells; keeps a state every ``steps`` steps."""

    @staticmethod
    def forward(ctx, config, batch_sizes, resets, steps, *inputs):
        grouped = _grouped(_Inputs(*inputs))
        rows, (groups, batch, state_size) = grouped.x.shape[0], grouped.h0.shape
        pieces = _pieces(rows, batch, batch_sizes, steps)
        output = grouped.x.new_empty(rows, groups * state_size)
        by_group = output.view(rows, groups, state_size)
        cells = grouped.c0.new_empty(rows, groups * grouped.c0.shape[2]) if config.cells else None
        cells_by_group = cells if cells is None else cells.view(rows, groups, -1)
        kept, finals = [], []
        for which, part, own in _directions(config, grouped):
            states = [None] * len(pieces)
            h, c = own.h0, own.c0
            for number in reversed(range(len(pieces))) if part.reverse[0] else range(len(pieces)):
                piece = pieces[number]
                states[number] = h, c
                here = own._replace(x=own.x[piece.begin : piece.end], h0=h, c0=c)
                own_resets = None if resets is None else resets[piece.begin : piece.end, which]
                result, h, new_c, _, _, _, *new_cells = _scan(part, piece.batch_sizes, own_resets, here, save=False)
                c = None if c is None else new_c
                by_group[piece.begin : piece.end, which] = result.view(-1, len(part.reverse), state_size)
                if cells is not None:
                    target = cells_by_group[piece.begin : piece.end, which]
                    target.copy_(new_cells[0].view(target.shape))
            kept += [tensor for state in states for tensor in state if tensor is not None]
            finals.append((h, c))
        ctx.config, ctx.steps = config, steps
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(batch_sizes, resets, *inputs, *kept)
        h_n, c_n = (None if parts[0] is None else torch.cat(parts) for parts in zip(*finals, strict=True))
        if c_n is None:
            c_n = h_n.new_empty(0)
            ctx.mark_non_differentiable(c_n)
        return (output, h_n, c_n) if cells is None else (output, h_n, c_n, cells)

    @staticmethod
    def backward(ctx, d_output, d_h_n, d_c_n, d_cells=None):
        batch_sizes, resets, *inputs = ctx.saved_tensors
        count = len(_Inputs._fields)
        inputs, kept = _Inputs(*inputs[:count]), inputs[count:]
        grouped = _grouped(inputs)
        config = ctx.config._replace(needs=tuple(ctx.needs_input_grad[4:]))
        cotangents = d_output, d_h_n, d_c_n, d_cells
        if all(cotangent is None for cotangent in cotangents):
            gradients = [None] * count
        elif torch.is_grad_enabled() or not are_plain(cotangents):
            # a graph of this pass is asked for, or it is mapped: that needs the whole reserve
            with torch.no_grad():
                gates, hidden_prev, cell_prev = _scan(config, batch_sizes, resets, grouped, save=True)[3:6]
            reserve = gates, hidden_prev, None if grouped.c0 is None else cell_prev
            arguments = config, batch_sizes, resets, *cotangents, *reserve
            if torch._C._are_functorch_transforms_active():
                gradients = ScanBackwardTransformed.apply(*arguments, *grouped)
            elif torch.is_grad_enabled():
                gradients = ScanBackward.apply(*arguments, *grouped)
            else:
                gradients = _scan_backward(*arguments, grouped)
            gradients = _of_the_only_example(gradients)
        else:
            gradients = _gradients_by_pieces(config, batch_sizes, resets, ctx.steps, *cotangents, grouped, kept)
        return None, None, None, None, *_as_given(gradients, inputs.x.dim() == 3)


def _gradients_by_pieces(config, batch_sizes, resets, steps, d_output, d_h_n, d_c_n, d_cells, inputs: _Inputs, kept):
    """Gradients of the inputs: each piece once more from the state kept before it, from the last to the first."""
    rows, (groups, batch, state_size) = inputs.x.shape[0], inputs.h0.shape
    pieces = _pieces(rows, batch, batch_sizes, steps)
    config = config._replace(cells=False)
    d_output = None if d_output is None else d_output.view(rows, groups, state_size)
    d_cells = None if d_cells is None else d_cells.view(rows, groups, -1)
    dx = torch.zeros_like(inputs.x) if config.needs[0] else None
    kept = iter(kept)
    by_part = []
    for which, part, own in _directions(config, inputs):
        states = [(next(kept), None if own.c0 is None else next(kept)) for _ in pieces]
        dh, dc = (None if gradient is None else gradient[which] for gradient in (d_h_n, d_c_n))
        sums = [None] * 5
        for number in range(len(pieces)) if part.reverse[0] else reversed(range(len(pieces))):
            begin, end, sizes = pieces[number]
            h, c = states[number]
            here = own._replace(x=own.x[begin:end], h0=h, c0=c)
            own_resets = None if resets is None else resets[begin:end, which]
            *_, gates, hidden_prev, cell_prev = _scan(part, sizes, own_resets, here, save=True)
            d_piece, d_piece_cells = (
                None if d is None else d[begin:end, which].flatten(1) for d in (d_output, d_cells)
            )
            reserve = gates, hidden_prev, None if c is None else cell_prev
            cotangents = d_piece, dh, dc, d_piece_cells
            gradients = _scan_backward(part, sizes, own_resets, *cotangents, *reserve, here, overwrite=True)
            d_piece, *d_weights, dh, dc = _of_the_only_example(gradients)
            if dx is not None:
                dx[begin:end, which if dx.shape[1] == groups else slice(None)] += d_piece
            # added up in float32: a sum in half precision would lose what its parts hold
            d_weights = [None if d is None else d.to(torch.promote_types(d.dtype, torch.float32)) for d in d_weights]
            sums = [d if total is None else total.add_(d) for total, d in zip(sums, d_weights, strict=True)]
        by_part.append([*(None if total is None else total.to(inputs.x.dtype) for total in sums), dh, dc])
    others = [None if parts[0] is None else torch.cat(parts) for parts in zip(*by_part, strict=True)]
    return [dx, *others]


class ScanBackward(Function):
    """(config, batch_sizes, resets, d_output, d_h_n, d_c_n, d_cells, *reserve, *inputs) -> gradients of the inputs."""

    @staticmethod
    def forward(ctx, config, batch_sizes, resets, *tensors):
        results = _without_views(_scan_backward(config, batch_sizes, resets, *tensors[:7], _Inputs(*tensors[7:])))
        ScanBackward.keep(ctx, (config, batch_sizes, resets, *tensors), results)
        return results

    @staticmethod
    def keep(ctx, inputs, output):
        config, batch_sizes, resets, d_output, d_h_n, d_c_n, d_cells, _, _, _, *tensors = inputs
        ctx.config = config
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(batch_sizes, resets, d_output, d_h_n, d_c_n, d_cells, *tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        batch_sizes, resets, *tensors = ctx.saved_tensors
        gradients = _second_derivative(ctx.config, batch_sizes, resets, tensors, cotangents)
        return (None, None, None, *gradients[:4], None, None, None, *gradients[4:])


def vector_jacobian_product(function, inputs: dict[str, Tensor], cotangents: dict[str, Tensor]) -> dict[str, Tensor]:
    """``torch.func.vjp``, but it also runs where saved-tensors hooks are active (``save_on_cpu``, a checkpoint)."""
    if torch._C._are_functorch_transforms_active():
        return torch.func.vjp(function, inputs)[1](cotangents)[0]
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        # aliases: a gradient must not flow on to another input from which this one was computed
        inputs = {
            name: tensor.view_as(tensor)
            if differentiable and tensor.requires_grad
            else tensor.detach().requires_grad_()
            for name, tensor in inputs.items()
        }
        results = {name: result for name, result in function(inputs).items() if result.requires_grad}
    gradients = torch.autograd.grad(
        list(results.values()),
        list(inputs.values()),
        [cotangents[name] for name in results],
        create_graph=differentiable,
        materialize_grads=True,
    )
    return dict(zip(inputs, gradients, strict=True))


def _second_derivative(
    config: _Config, batch_sizes: Tensor | None, resets: Tensor | None, tensors, cotangents
) -> list[Tensor | None]:
    """The vector-Jacobian product of ``ScanBackward`` for tensors = (d_output, d_h_n, d_c_n, d_cells, *inputs).

    ``ScanBackward`` is itself the vector-Jacobian product of ``reference.layer``: two nested ones give the second.
    """
    names = (*_RESULTS, *_Inputs._fields)
    given = {name: tensor for name, tensor in zip(names, tensors, strict=True) if tensor is not None}
    wanted = {name: u for name, u in zip(_Inputs._fields, cotangents, strict=True) if u is not None}
    if not wanted:
        return [None] * len(names)
    sizes = None if batch_sizes is None else batch_sizes // config.examples

    def first_derivative(given: dict[str, Tensor], resets: Tensor | None) -> dict[str, Tensor]:
        d_results = {name: given[name] for name in _RESULTS if name in given}
        inputs = {name: given[name] for name in _Inputs._fields if name in given}

        def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            arguments = [inputs.get(name) for name in _Inputs._fields]
            results = reference.layer(config.cell, *arguments, sizes, config.reverse, resets)
            results = dict(zip(_RESULTS, results, strict=True))
            return {name: results[name] for name in d_results}

        gradients = vector_jacobian_product(forward, inputs, d_results)
        return {name: gradients[name] for name in wanted}

    def per_example(given: dict[str, Tensor]) -> dict[str, Tensor]:
        if config.examples == 1:
            gradients = first_derivative(given, resets)
            return {name: g[None] if name in _PER_EXAMPLE else g for name, g in gradients.items()}
        split = {
            name: tensor if name in _PER_EXAMPLE else tensor.unflatten(_axis(name), (-1, config.examples))
            for name, tensor in given.items()
        }
        in_dims = {name: None if name in _PER_EXAMPLE else _axis(name) + 1 for name in split}
        out_dims = {name: 0 if name in _PER_EXAMPLE else _axis(name) + 1 for name in wanted}
        own_resets = None if resets is None else resets.unflatten(0, (-1, config.examples))
        mapped = torch.func.vmap(first_derivative, in_dims=(in_dims, None if resets is None else 1), out_dims=out_dims)
        gradients = mapped(split, own_resets)
        return {
            name: g if name in _PER_EXAMPLE else g.flatten(_axis(name), _axis(name) + 1)
            for name, g in gradients.items()
        }

    gradients = vector_jacobian_product(per_example, given, wanted)
    return [gradients.get(name) for name in names]


# Of a layer, with what has a gradient.
_RESULTS = ("output", "h_n", "c_n", "cells")

# Gradients of these are kept apart for every example; all other tensors hold the examples in their batch.
_PER_EXAMPLE = ("weight_ih", "bias_ih", "weight_hh", "bias_hh", "weight_hr")


def _axis(name: str) -> int:
    """The dimension of tensor ``name`` that counts rows (0) or, in a state (D, B, H), sequences (1)."""
    return 1 if name in ("h0", "c0", "h_n", "c_n") else 0


class _Folding:
    """Folds the dimension that ``vmap`` maps over into the batch or into the groups of a layer's tensors, and back.

    Into the batch, example n of row r goes to row r * N + n, which keeps the running sequences of a packed
    batch in front. Into the groups, for weights of which every example has its own, model n of group d goes to
    group n * D + d.
    """

    def __init__(self, size: int, into_groups: bool):
        self.size = size
        self.into_groups = into_groups

    def fold(self, name: str, tensor: Tensor | None, dim: int | None) -> Tensor | None:
        if tensor is None or (tensor.numel() == 0 and dim is None):
            return tensor
        if not self.into_groups:
            if name in _PER_EXAMPLE:
                return tensor
            axis = _axis(name)
            return self._moved(tensor, dim, axis + 1).flatten(axis, axis + 1)
        axis = self._group_axis(name)
        return self._moved(tensor, dim, axis).flatten(axis, axis + 1)

    def unfold(self, name: str, tensor: Tensor | None) -> tuple[Tensor | None, int | None]:
        """The tensor with the mapped dimension apart, and where that dimension is."""
        if tensor is None or tensor.numel() == 0:
            return tensor, None
        if self.into_groups:
            # gradients of weights have a dimension of examples in front
            axis = self._group_axis(name) + (name.removeprefix("d_") in _PER_EXAMPLE)
            return tensor.unflatten(axis, (self.size, -1)), axis
        axis = _axis(name.removeprefix("d_"))
        return tensor.unflatten(axis, (-1, self.size)), axis + 1

    def _group_axis(self, name: str) -> int:
        name = name.removeprefix("d_")
        return 0 if name in _PER_EXAMPLE or name in ("h0", "c0", "h_n", "c_n") else 1

    def _moved(self, tensor: Tensor, dim: int | None, target: int) -> Tensor:
        if dim is None:
            tensor = tensor.unsqueeze(target)
            return tensor.expand(*tensor.shape[:target], self.size, *tensor.shape[target + 1 :])
        return tensor.movedim(dim, target)

    def batch_sizes(self, batch_sizes: Tensor | None) -> Tensor | None:
        return batch_sizes if batch_sizes is None or self.into_groups else batch_sizes * self.size


def _mapped(function, info, in_dims, config, batch_sizes, resets, names, tensors, result_names):
    """Apply ``function`` to tensors with a mapped dimension: ``vmap``'s rule for both Functions."""
    _, _, dim_of_resets, *dims = in_dims
    into_groups = any(dim is not None for name, dim in zip(names, dims, strict=True) if name in _PER_EXAMPLE)
    folding = _Folding(info.batch_size, into_groups)
    folded = [folding.fold(*slot) for slot in zip(names, tensors, dims, strict=True)]
    if into_groups:
        config = config._replace(reverse=config.reverse * info.batch_size)
    elif function is ScanBackwardTransformed:
        config = config._replace(examples=config.examples * info.batch_size)
    resets = folding.fold("resets", resets, dim_of_resets)
    results = function.apply(config, folding.batch_sizes(batch_sizes), resets, *folded)
    unfolded = [folding.unfold(*slot) for slot in zip(result_names, results, strict=True)]
    return tuple(tensor for tensor, _ in unfolded), tuple(dim for _, dim in unfolded)


_RESERVE = ("gates", "hidden_prev", "cell_prev")


class ScanTransformed(Scan):
    """``Scan`` for functorch's transforms."""

    setup_context = staticmethod(Scan.keep)

    @staticmethod
    def forward(config, batch_sizes, resets, *inputs):
        return _scan(config, batch_sizes, resets, _Inputs(*inputs), save=True)

    @staticmethod
    def vmap(info, in_dims, config, batch_sizes, resets, *inputs):
        results = ("output", "h_n", "c_n", *_RESERVE, *(("cells",) if config.cells else ()))
        return _mapped(ScanTransformed, info, in_dims, config, batch_sizes, resets, _Inputs._fields, inputs, results)


class ScanBackwardTransformed(ScanBackward):
    """``ScanBackward`` for functorch's transforms."""

    setup_context = staticmethod(ScanBackward.keep)

    @staticmethod
    def forward(config, batch_sizes, resets, *tensors):
        return _without_views(_scan_backward(config, batch_sizes, resets, *tensors[:7], _Inputs(*tensors[7:])))

    @staticmethod
    def vmap(info, in_dims, config, batch_sizes, resets, *tensors):
        names = (*_RESULTS, *_RESERVE, *_Inputs._fields)
        results = [f"d_{name}" for name in _Inputs._fields]
        return _mapped(ScanBackwardTransformed, info, in_dims, config, batch_sizes, resets, names, tensors, results)


def _keep_for_operator(ctx, inputs, output):
    backend, cell, *tensors, reverse, _, resets, cells = inputs
    ctx.config = (backend, cell, reverse, cells)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, resets)


@once_differentiable
def _operator_gradients(ctx, d_output, d_h_n, d_c_n, _gates, _hidden_prev, _cell_prev, d_cells):
    """The derivative of the operator called by itself, as programs from ``torch.export`` and ``torch.jit.trace`` do."""
    backend, cell, reverse, cells = ctx.config
    *inputs, batch_sizes, resets = ctx.saved_tensors
    # such a program was recorded without saving anything: run the loop once more
    results = ops.layer_forward(backend, cell, *inputs, batch_sizes, reverse, True, resets)
    gates, hidden_prev, cell_prev = results[3:6]
    if inputs[-1] is None:
        d_c_n = cell_prev = None
    if not cells:
        d_cells = None
    config = _Config(backend, cell, reverse, needs=tuple(ctx.needs_input_grad[2:10]))
    gradients = _scan_backward(
        config, batch_sizes, resets, d_output, d_h_n, d_c_n, d_cells, gates, hidden_prev, cell_prev, _Inputs(*inputs)
    )
    return None, None, *_of_the_only_example(gradients), None, None, None, None, None


torch.library.register_autograd(
    "fastrnn::layer_forward", _operator_gradients, setup_context=_keep_for_operator, lib=ops._library
)


def _is_in_jvp() -> bool:
    """Whether ``torch.func.jvp`` is active. In a compiled function it does not raise forward AD's own level."""
    interpreters = torch._C._functorch.get_interpreter_stack() or ()
    return any(interpreter.key() == torch._C._functorch.TransformType.Jvp for interpreter in interpreters)


def layer(
    backend: str,
    cell: str,
    x: Tensor,
    weight_ih: Tensor,
    bias_ih: Tensor | None,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: list[int],
    checkpoint: int | None = None,
    resets: Tensor | None = None,
    lengths: Tensor | None = None,
    cells: bool = False,
    extras: Extras | None = None,
) -> tuple[Tensor, ...]:
    """Run one layer of ``cell`` over whole sequences, for D groups (directions) side by side.

    Args:
        backend: a name from ``fastrnn.backends()`` other than "torch".
        cell: "rnn_tanh", "rnn_relu", "gru" or "lstm".
        x: (rows, 1, I), the rows of a dense (T * B) or packed input; see ``fastrnn.ops``. With one group x may be
            (rows, I); then all weights and biases come without their first dimension too.
        weight_ih, bias_ih: (D, G*H, I) and (D, G*H), gates in torch's order.
        weight_hh, bias_hh: (D, G*H, H') and (D, G*H), H' = proj_size or H. Both biases or none.
        weight_hr: (D, H', H), the LSTM's projection, or None.
        h0: (D, B, H').
        c0: (D, B, H) for the LSTM, else None.
        batch_sizes: (T,) int64 on the CPU for a packed input, None for a dense one.
        reverse: for every group 1 if it walks back in time, else 0.
        checkpoint: keep the state every so many time steps, and compute again what lies between; None keeps all.
            Where a transform, a tracer or torch.compile looks on, all is kept.
        resets: (rows, D) bool: whether the state of a group is zero before the step of a row.
        lengths: (B,) int64 on x's device, for a dense input and the backend "reference" only: a sequence's state stays
            as it is past its length, and its output is zero there. Kernels take such a batch packed.
        cells: whether the LSTM's cell state after every step is wanted as well.
        extras: what the step computes with beyond torch.nn's tensors; then all is kept, whatever ``checkpoint`` says.

    Returns:
        output (rows, D*H'), h_n like h0, for the LSTM c_n like c0, and with ``cells`` the cell states (rows, D*H).
        All of x's dtype.
    """
    inputs = _Inputs(x, weight_ih, bias_ih, weight_hh, bias_hh, weight_hr, h0, c0)
    if extras is not None:
        return recurrence.layer(backend, cell, _grouped(inputs), batch_sizes, reverse, resets, lengths, cells, extras)
    if checkpoint is not None and checkpoint < 1:
        raise ValueError(f"checkpoint should be None or a number of time steps, 1 or more, got {checkpoint}")
    transformed = torch._C._are_functorch_transforms_active()
    # torch.autograd.Function has no forward mode that Dynamo takes as well: plain torch operations serve it
    if backend == "reference" or torch.autograd.forward_ad._current_level >= 0 or (transformed and _is_in_jvp()):
        results = reference.layer(cell, *_grouped(inputs), batch_sizes, reverse, resets, lengths)
        return results[: 2 if results[2] is None else 4 if cells else 3]
    config = _Config(backend, cell, tuple(reverse))
    if cells:
        config = config._replace(cells=True)
    if transformed:
        results = ScanTransformed.apply(config, batch_sizes, resets, *_grouped(inputs))
    elif (
        torch.is_grad_enabled()
        # a Function cannot be part of a torch.jit.trace, an operator can
        and not torch.jit.is_tracing()
        and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    ):
        if checkpoint is not None and is_plain(inputs) and x.shape[0]:
            if x.dtype in (torch.bfloat16, torch.float16):
                # the state between two pieces would be rounded: a layer keeps it in float32 from step to step
                wide = [None if tensor is None else tensor.float() for tensor in inputs]
                results = layer(backend, cell, *wide, batch_sizes, reverse, checkpoint, resets, None, cells)
                return tuple(result.to(x.dtype) for result in results)
            results = ScanCheckpointed.apply(config, batch_sizes, resets, checkpoint, *inputs)
        else:
            results = Scan.apply(config, batch_sizes, resets, *inputs)
    else:
        results = _scan(config, batch_sizes, resets, _grouped(inputs), save=False)
    if cells:
        return *results[:3], results[-1]
    return results[:3] if CELLS[cell].has_cell_state else results[:2]
