"""The ordered table of backends: which of them are there, which can run a call, and which one will.

The first backend of the table that is available and can run the call takes it. ``torch`` stands last of those that are
asked, so that whatever torch.nn accepts works; ``reference`` runs only when it is named, or where torch.nn lacks what
is asked for and no kernel has it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import importlib.util
import os
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch


class Call(NamedTuple):
    """What a backend needs to know to say whether it can run a layer. Batch and length are left out on purpose."""

    cell: str  # rnn_tanh, rnn_relu, gru or lstm
    device: str  # device type, "cpu" or "cuda"
    dtype: torch.dtype  # that the layer computes in, the one of autocast if that is on
    input_size: int
    hidden_size: int
    proj_size: int
    num_directions: int
    options: tuple[str, ...] = ()  # names of what is beyond torch.nn, see fastrnn.options.Options


class BackendInfo(NamedTuple):
    """One row of ``fastrnn.backends()``."""

    name: str
    available: bool
    reason: str


class Selection(NamedTuple):
    """The backend that runs a call, and why those before it in the table do not."""

    backend: str
    passed_over: tuple[tuple[str, str], ...]


class _Backend(NamedTuple):
    module: str | None  # the module with can_run, layer_forward and layer_backward; None: plain torch
    requires: str | None  # the package that the module imports
    about: str
    only_named: bool = False  # runs only when it is named


_TABLE = {
    "numba": _Backend("fastrnn.kernels.numba_layer", "numba", "fused kernels for CPUs, compiled by Numba"),
    "cuda": _Backend(
        "fastrnn.kernels.cuda_scan",
        None,
        "fused C++/CUDA kernels for NVIDIA GPUs; only when named, no GPU ran them",
        True,
    ),
    "triton": _Backend(
        "fastrnn.kernels.triton_layer", "triton", "fused kernels for GPUs; only when named, no GPU ran them", True
    ),
    "torch": _Backend(None, None, "torch.nn's own kernels; takes whatever torch.nn takes"),
    "reference": _Backend(None, None, "plain torch operations, the specification; runs only when named", True),
}


class _Choice(threading.local):
    """The backend that was asked for, or None to choose by the table; every thread has its own."""

    name: str | None = os.environ.get("FASTRNN_BACKEND") or None


choice = _Choice()


@functools.cache
def _unavailable(name: str) -> str | None:
    package = _TABLE[name].requires
    if package is not None and importlib.util.find_spec(package) is None:
        return f"the package {package} is not installed"
    return kernels(name).unavailable() if name == "cuda" else None


@functools.cache
def kernels(name: str) -> ModuleType:
    """The module with the kernels of backend ``name``, imported on first use."""
    with without_garbage_collection():
        return importlib.import_module(_TABLE[name].module)


@functools.cache
def recurrence_kernels() -> ModuleType:
    """The module with the time loops of steps that are not torch.nn's: Numba's, the only backend that has them."""
    with without_garbage_collection():
        return importlib.import_module("fastrnn.kernels.numba_recurrence")


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Python's collector off: while Numba is imported, it would look at all of torch's objects over and over."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def backends() -> list[BackendInfo]:
    """All backends in the order in which they are asked: name, whether this machine has it, and why or why not."""
    return [
        BackendInfo(name, _unavailable(name) is None, _unavailable(name) or backend.about)
        for name, backend in _TABLE.items()
    ]


def _check_name(name: str) -> None:
    if name not in _TABLE:
        raise ValueError(f"unknown backend {name!r}; fastrnn has {', '.join(map(repr, _TABLE))}")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every layer inside the ``with`` block on backend ``name``, in the thread that entered it.

    The environment variable ``FASTRNN_BACKEND`` does the same for a whole process. A call that the backend cannot run
    raises ``RuntimeError``; it does not fall back to another one.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: the backend is not available on this machine.
    """
    _check_name(name)
    reason = _unavailable(name)
    if reason:
        raise RuntimeError(f"the backend {name!r} is not available: {reason}")
    before, choice.name = choice.name, name
    try:
        yield
    finally:
        choice.name = before


def _objection(name: str, call: Call) -> str | None:
    """Why backend ``name`` cannot run ``call``, or None if it can."""
    reason = _unavailable(name)
    if reason or name == "reference":
        return reason
    if name == "torch":
        return f"torch.nn has no {' and no '.join(call.options)}" if call.options else None
    return kernels(name).can_run(call)


@functools.cache
def _select(call: Call, chosen: str | None) -> Selection:
    if chosen is not None:
        _check_name(chosen)
        reason = _objection(chosen, call)
        if reason and chosen == "torch":
            return Selection("reference", ((chosen, reason),))
        if reason:
            raise RuntimeError(
                f"the backend {chosen!r} was asked for and cannot run this layer: {reason}. "
                "Choose another with fastrnn.use_backend or FASTRNN_BACKEND, or leave the choice to fastrnn."
            )
        return Selection(chosen, ())
    passed_over = []
    for name, backend in _TABLE.items():
        if backend.only_named:
            continue
        reason = _objection(name, call)
        if reason is None:
            return Selection(name, tuple(passed_over))
        passed_over.append((name, reason))
    return Selection("reference", tuple(passed_over))


def select(call: Call) -> Selection:
    """The backend for ``call``.

    Raises:
        ValueError: ``FASTRNN_BACKEND`` names no backend.
        RuntimeError: the backend that was asked for cannot run the call.
    """
    return _select(call, choice.name)
