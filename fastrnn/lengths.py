"""``lengths=``: a padded batch as the packed rows that kernels run, and back, in torch operations.

Rows past a sequence's end stay out, so that padding costs nothing. Where shapes must not depend on numbers (while
torch.compile or torch.export trace), the padding is packed as well, as B sequences of its own: always T * B rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """How a padded batch of B sequences and T steps is packed: sequences by falling length, as in torch.nn."""

    index: Tensor  # (R,) int64: the place of every packed row among the T * B rows
    batch_sizes: Tensor  # (T,) int64, zero at steps that no sequence reaches
    order: Tensor  # (S,) int64: the sequence at each place of the packed batch; from B on the padding's
    size: int  # T * B
    valid: Tensor | None  # (T * B, 1) bool, where the padding is packed too

    def pack(self, rows: Tensor) -> Tensor:
        """(T * B, I) to (R, I). What stands in the padding is not looked at."""
        if self.valid is not None:
            rows = torch.where(self.valid, rows, 0)
        return rows.index_select(0, self.index)

    def unpack(self, rows: Tensor) -> Tensor:
        """(R, .) to (T * B, .), zero past the end of every sequence."""
        padded = rows.new_zeros(self.size, rows.shape[1]).index_copy(0, self.index, rows)
        return padded if self.valid is None else torch.where(self.valid, padded, 0)

    def pack_state(self, state: Tensor) -> Tensor:
        """(., B, .) to (., S, .)."""
        if self.valid is not None:
            state = torch.cat([state, torch.zeros_like(state)], 1)
        return state.index_select(1, self.order)

    def unpack_states(self, states: tuple[Tensor, ...], batch: int) -> tuple[Tensor, ...]:
        """(., S, .) to (., B, .) each."""
        places = self.order.argsort()[:batch]
        return tuple(state.index_select(1, places) for state in states)


def _unmapped(tensor: Tensor) -> Tensor | None:
    """The tensor below functorch's wrappers, or None where ``vmap`` maps it."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return None
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def checked(lengths, input: Tensor, steps: int, shape: tuple[int, ...]) -> Tensor:
    """``lengths`` of a call as int64, (B,), with numbers between 0 and ``steps``; on the CPU if the input is.

    Where they can be looked at without waiting for a GPU, wrong ones raise ValueError here. Elsewhere they fail when
    the GPU, or the compiled program, gets there (``torch._assert_async``).
    """
    if not isinstance(lengths, Tensor) or lengths.dtype.is_floating_point or lengths.dtype.is_complex:
        got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"lengths should be a tensor of whole numbers, got {got}: try torch.as_tensor(lengths).long()")
    if lengths.dtype == torch.bool:
        raise TypeError("lengths should be a tensor of whole numbers, got torch.bool: of a mask (T, B) try mask.sum(0)")
    if lengths.shape != shape:
        expected = f"{shape}, one for each sequence" if shape else "(), for a single sequence"
        raise ValueError(f"lengths should have the shape {expected}, got {tuple(lengths.shape)}")
    if lengths.is_meta and not input.is_meta:
        raise ValueError(f"lengths are on the device meta and hold no numbers; the input is on {input.device}")
    lengths = lengths.reshape(-1).long()
    if input.device.type == "cpu":
        lengths = lengths.cpu()
    if torch.compiler.is_compiling() or lengths.device.type not in ("cpu", "meta"):
        valid = ((lengths >= 0) & (lengths <= steps)).all()
        torch._assert_async(valid, f"lengths should be between 0 and the input's {steps} time steps")
    elif not lengths.is_meta:
        plain = lengths
        while torch._C._functorch.is_functorch_wrapped_tensor(plain):
            plain = torch._C._functorch.get_unwrapped(plain)
        least, most = plain.aminmax() if type(plain) is Tensor else (0, steps)
        if least < 0 or most > steps:
            wrong = plain[(plain < 0) | (plain > steps)].tolist()
            raise ValueError(f"lengths should be between 0 and the input's {steps} time steps, got {wrong[:20]}")
    return lengths


def pack(lengths: Tensor, steps: int, batch: int) -> Packing | None:
    """The packing of a batch on the CPU, or None where the lengths differ from one mapped example to the next."""
    time = torch.arange(steps, device="cpu")[:, None]
    if not torch.compiler.is_compiling():
        lengths = _unmapped(lengths)
        if lengths is None:
            return None
        if type(lengths) is Tensor:
            order = lengths.argsort(descending=True, stable=True)
            running = time < lengths[order]
            return Packing((time * batch + order)[running], running.sum(1), order, steps * batch, None)
    both, starts = torch.cat([lengths, steps - lengths]), torch.cat([torch.zeros_like(lengths), lengths])
    order = both.argsort(descending=True, stable=True)
    running = time < both[order]
    places = (~running).flatten().argsort(stable=True)[: steps * batch]
    sequence = order[places % (2 * batch)]
    index = (places // (2 * batch) + starts[sequence]) * batch + sequence % batch
    return Packing(index, running.sum(1), order, steps * batch, (time < lengths).reshape(-1, 1))
