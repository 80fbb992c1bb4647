"""A layer whose step is not torch.nn's: the reference for all, on every backend that has no kernel of its own."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from . import reference
from .reference import Extras


def _without_autocast(tensor: Tensor):
    """No autocast: the caller has chosen the dtype, and a state is kept in float32 from step to step."""
    device = tensor.device.type
    if torch._C._is_any_autocast_enabled() and torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def layer(backend: str, cell: str, inputs, batch_sizes, reverse, resets, extras: Extras) -> tuple[Tensor, ...]:
    """``functional.layer`` with extras; ``inputs`` are its tensors with their dimension of groups."""
    with _without_autocast(inputs.x):
        results = reference.layer(cell, *inputs, batch_sizes, reverse, resets, extras)
    return results if results[2] is not None else results[:2]
