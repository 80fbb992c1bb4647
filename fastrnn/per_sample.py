"""``fastrnn.per_sample_gradients``: the gradient of every sample of a batch by itself, as private training needs it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import PackedSequence


def per_sample_gradients(
    module: nn.Module,
    loss: Callable[..., Tensor],
    inputs: Tensor | tuple[Tensor, ...],
    *targets: Tensor,
    batch_dim: int | tuple[int, ...] = 0,
    chunk_size: int | None = None,
) -> dict[str, Tensor]:
    """The gradients of ``loss(module(*inputs), *targets)`` for every sample: what DP-SGD clips (Abadi et al. 2016).

    The same as a loop over batches of one, as Opacus' ``grad_sample``. A layer of fastrnn in the module runs its
    kernels once for all samples, and the weights' gradients come out of them apart.

    Args:
        module: a layer of fastrnn, or any model that ``torch.func.vmap`` can run.
        loss: gets what the module returns for a batch of one, then that sample's targets, and gives a scalar.
        inputs: the tensor, or the tuple of tensors, that the module is called with.
        targets: further tensors for ``loss``.
        batch_dim: which dimension of the inputs and targets counts samples; one for all, or one for each. A layer
            without ``batch_first`` has it at 1. Module and loss see it too, of size 1.
        chunk_size: how many samples run at a time, None for all; less memory for more time.

    Dropout draws anew for every sample. The parameters' own ``.grad`` stay as they are.

    Returns:
        For every parameter that requires a gradient, by its name in ``module``, (samples, *shape of the parameter).

    Raises:
        TypeError: ``inputs`` is a ``PackedSequence``, whose samples have no dimension of their own.
        ValueError: batch_dim does not fit the inputs and targets, or they have different numbers of samples.
        RuntimeError: ``loss`` gives no scalar.
    """
    if isinstance(inputs, PackedSequence):
        raise TypeError("inputs is a PackedSequence: pass the padded tensor and lengths=, by a module that takes both")
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    tensors = (*inputs, *targets)
    dims = batch_dim if isinstance(batch_dim, tuple) else (batch_dim,) * len(tensors)
    if len(dims) != len(tensors):
        raise ValueError(f"batch_dim should be one number or one for each of {len(tensors)} tensors, got {batch_dim}")
    sizes = {
        tensor.shape[dim] if -tensor.dim() <= dim < tensor.dim() else None
        for tensor, dim in zip(tensors, dims, strict=True)
    }
    if None in sizes or len(sizes) > 1:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        expected = f"inputs and targets should have as many samples each, counted by batch_dim={batch_dim}"
        raise ValueError(f"{expected}; their shapes are {shapes}")
    parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}

    def loss_of_one(parameters: dict[str, Tensor], *samples: Tensor) -> Tensor:
        # a negative dimension counts from the end of the whole tensor, as unsqueeze does
        samples = [sample.unsqueeze(dim) for sample, dim in zip(samples, dims, strict=True)]
        result = functional_call(module, parameters, tuple(samples[: len(inputs)]))
        return loss(result, *samples[len(inputs) :])

    gradients = vmap(grad(loss_of_one), (None, *dims), randomness="different", chunk_size=chunk_size)
    with torch.enable_grad():
        return gradients(parameters, *tensors)
