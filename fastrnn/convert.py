"""``fastrnn.convert``: torch.nn's recurrent modules to fastrnn's inside a model, and back; and weights from Keras."""

from __future__ import annotations

import warnings

import torch
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
        if to == "torch" and type(module) in targets and getattr(module, "_options", None) is not None:
            raise ValueError(
                f"torch.nn.{type(module).__name__} has no {' and no '.join(module._options.names)}: "
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


def load_keras_weights(module: modules._Layer, weights, layer: int = 0, reverse: bool = False) -> None:
    """Copy the weights of a Keras ``SimpleRNN``, ``GRU`` or ``LSTM`` into one layer and direction of a fastrnn layer.

    Keras multiplies from the left, so that its matrices are transposed, and has the gates of the GRU in the order z, r,
    n; those of the LSTM are torch's. A GRU made by ``reset_after=False`` has one bias, which becomes ``bias_ih``;
    ``bias_hh`` becomes zero, as for the other cells. Both sides compute the same where Keras's layer has its usual
    activations, tanh and sigmoid.

    Args:
        module: ``fastrnn.RNN``, ``GRU`` or ``LSTM``, without ``proj_size``.
        weights: what the Keras layer's ``get_weights()`` gives, as arrays or tensors: kernel (I, G*H), recurrent kernel
            (H, G*H) and, unless the layer has no bias, bias (G*H,), for a GRU with ``reset_after=True`` (2, 3*H). A
            Keras ``Bidirectional`` layer gives those of its forward layer, then those of its backward layer: call this
            twice.
        layer: number of the layer, from 0.
        reverse: whether to load the reverse direction.

    Raises:
        TypeError: the module is no layer of fastrnn.
        ValueError: number or shapes of the weights do not fit the module, or ``reset_after`` differs.
    """
    if not isinstance(module, modules._Layer):
        raise TypeError(f"Keras weights go to fastrnn.RNN, GRU and LSTM, got {type(module).__name__}")
    if not 0 <= layer < module.num_layers or (reverse and not module.bidirectional):
        raise ValueError(f"{module} has no layer {layer}{' in the reverse direction' * reverse}")
    if module.proj_size:
        raise ValueError(f"Keras's layers have no projection, the module has proj_size={module.proj_size}")
    arrays = [torch.as_tensor(array) for array in weights]
    if len(arrays) != 2 + module.bias:
        wanted = "kernel, recurrent kernel and bias" if module.bias else "kernel and recurrent kernel"
        raise ValueError(f"a module with bias={module.bias} takes {wanted}, got {len(arrays)} arrays")
    suffix = f"_l{layer}{'_reverse' * reverse}"
    names = [name + suffix for name in ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if module.bias else ()))]
    if computed := [name for name in names if name not in module._parameters]:
        raise ValueError(f"{', '.join(computed)} are no parameters but computed from others: load before parametrizing")
    targets = [getattr(module, name + suffix) for name in ("weight_ih", "weight_hh")]
    shapes = [tuple(target.shape[::-1]) for target in targets]
    gate_size = shapes[0][1]
    if module.bias:
        reset_after = module.mode == "GRU" and (module._options is None or module._options.reset_after)
        shapes.append((2, gate_size) if reset_after else (gate_size,))
    given = [tuple(array.shape) for array in arrays]
    if given != shapes:
        both = [(gate_size,), (2, gate_size)]
        hint = ""
        if module.mode == "GRU" and given[:2] == shapes[:2] and given[2] in both:
            hint = f": that is a Keras GRU with reset_after={given[2] != both[0]}, make the module so too"
        raise ValueError(f"the weights should have the shapes {shapes}, got {given}{hint}")

    def in_order(array: torch.Tensor) -> torch.Tensor:
        """Keras's gates, in the last dimension, in torch's order."""
        if module.mode != "GRU":
            return array
        z, r, n = array.chunk(3, -1)
        return torch.cat([r, z, n], -1)

    with torch.no_grad():
        for target, array in zip(targets, arrays, strict=False):
            target.copy_(in_order(array).T)
        if module.bias:
            bias = in_order(arrays[2])
            bias_ih, bias_hh = bias if bias.dim() == 2 else (bias, torch.zeros_like(bias))
            getattr(module, "bias_ih" + suffix).copy_(bias_ih)
            getattr(module, "bias_hh" + suffix).copy_(bias_hh)


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
