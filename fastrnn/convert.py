"""``fastrnn.convert``: torch.nn's recurrent modules to fastrnn's inside a model, and back."""

from __future__ import annotations

import warnings

from torch import nn

from . import modules

_PAIRS = {
    nn.RNN: modules.RNN,
    nn.GRU: modules.GRU,
    nn.LSTM: modules.LSTM,
    nn.RNNCell: modules.RNNCell,
    nn.GRUCell: modules.GRUCell,
    nn.LSTMCell: modules.LSTMCell,
}


def convert(model: nn.Module, to: str = "fastrnn") -> nn.Module:
    """Replace every recurrent layer and cell inside ``model``, in place, by one that shares its Parameters.

    Optimizers, tied weights, hooks, names in the state dict and the training flag stay as they are. A module that is
    used in several places is replaced by one module. Convert before ``torch.compile``.

    Args:
        model: any module. A recurrent layer or cell itself is answered with its replacement.
        to: "fastrnn", or "torch" for real torch.nn modules (for ONNX export, ``torch.jit.script``, sharing).

    Returns:
        ``model``, or its replacement if it is itself a recurrent module.

    Warns:
        UserWarning: a subclass of a recurrent module was left alone, for it may override anything.

    Raises:
        ValueError: ``to`` is neither "fastrnn" nor "torch", or a layer has options that torch.nn does not have; the
            model is then as it was.
    """
    if to not in ("fastrnn", "torch"):
        raise ValueError(f'convert to "fastrnn" or "torch", got {to!r}')
    targets = _PAIRS if to == "fastrnn" else {ours: theirs for theirs, ours in _PAIRS.items()}
    for name, module in model.named_modules():
        if to == "torch" and type(module) in targets and getattr(module, "options", None) is not None:
            raise ValueError(
                f"torch.nn.{type(module).__name__} has no {' and no '.join(module.options.names)}: "
                f"{name or 'the module'} cannot be converted to it"
            )
    replacements = {
        module: _twin(module, targets[type(module)]) for module in model.modules() if type(module) in targets
    }
    for name, module in model.named_modules():
        if module not in replacements and isinstance(module, tuple(targets)):
            warnings.warn(
                f"convert left {name or 'the model itself'} alone: {type(module).__name__} is a subclass of "
                f"{_known_base(module, targets).__name__} and may override what it likes",
                stacklevel=2,
            )
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child in replacements:
                module._modules[name] = replacements[child]
    return replacements.get(model, model)


def _known_base(module: nn.Module, targets: dict) -> type[nn.Module]:
    return next(base for base in type(module).__mro__ if base in targets)


def _twin(module: nn.Module, target: type[nn.Module]) -> nn.Module:
    """A module of class ``target`` with everything that ``module`` has: Parameters, settings, hooks."""
    twin = target.__new__(target)
    # Registries are copied, so that an assignment to one module does not reach the other; the hooks' are
    # shared, so that handles to remove them keep working.
    registries = ("_parameters", "_buffers", "_modules", "_flat_weights_names", "_all_weights")
    for name, value in module.__dict__.items():
        twin.__dict__[name] = value.copy() if name in registries else value
    if isinstance(twin, nn.RNNBase):
        twin.__dict__.pop("_flat_weights", None)
        twin._init_flat_weights()
    return twin
