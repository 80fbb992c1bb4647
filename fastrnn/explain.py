"""``fastrnn.explain``: which backend each layer of a module will use on an input, and why not another one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import dispatch
from .modules import _autocast_dtype, _Cell, _Layer


@dataclass(frozen=True)
class LayerExplanation:
    """The backend of one layer and, in the table's order, the backends passed over with the reason."""

    layer: int
    backend: str
    passed_over: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Explanation:
    """The answer of ``fastrnn.explain``; ``str()`` of it reads as text."""

    module: str
    input: str
    layers: tuple[LayerExplanation, ...]

    def __str__(self) -> str:
        lines = [f"{self.module} on {self.input}"]
        for layer in self.layers:
            lines.append(f"  layer {layer.layer}: {layer.backend}")
            lines += [f"    not {name}: {reason}" for name, reason in layer.passed_over]
        return "\n".join(lines)

    __repr__ = __str__


def explain(module: _Layer | _Cell, input: Tensor | PackedSequence) -> Explanation:
    """Say which backend each layer of ``module`` will use for ``input``, and why those before it were passed over.

    Args:
        module: a layer or cell of fastrnn.
        input: what would be passed to it; only its dtype, device and shape matter. Autocast is taken into account.

    Returns:
        An ``Explanation``; print it, or read its ``layers``.

    Raises:
        TypeError: ``module`` is none of fastrnn's.
        RuntimeError: the backend that was asked for cannot run the module.
    """
    if not isinstance(module, _Layer | _Cell):
        raise TypeError(
            f"explain takes a layer or cell of fastrnn, got {type(module).__name__}; for a model, pass the recurrent "
            "module inside it, and fastrnn.convert(model) puts fastrnn's modules there"
        )
    data = input.data if isinstance(input, PackedSequence) else input
    call = dispatch.Call(*module._call(_autocast_dtype(data), data.device.type))
    selection = dispatch.select(call)
    if selection.backend != "torch" and module._prepare(input, None) is None:
        reason = "the input is empty or does not fit the module: torch.nn decides what it gives or raises"
        selection = dispatch.Selection("torch", (*selection.passed_over, (selection.backend, reason)))
    count = module.num_layers if isinstance(module, _Layer) else 1
    layers = tuple(LayerExplanation(layer, *selection) for layer in range(count))
    kind = "packed " if isinstance(input, PackedSequence) else ""
    description = f"{kind}{tuple(data.shape)} {str(data.dtype).removeprefix('torch.')} on {data.device}"
    return Explanation(repr(module), description, layers)
