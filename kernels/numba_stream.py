"""One time step after another: the forward call of one layer, prepared once and run again and again.

For few sequences the weights are read where the module keeps them: a step is bound by the speed at which that can be
done. For many they are packed, once: every step looks whether they have changed (``is_kept`` of ``numba_layer.py``).
"""

import torch
from torch import Tensor

from . import numba_call as field
from .numba_call import OUTPUT, X
from .numba_compile import copy_of, prepare_run
from .numba_layer import Sizes, kernel, make_plan, new_panels


class _Prepared:
    """The call of one step of a layer of one direction, in float32 or float64, but for the arrays that change.

    Weights are contiguous and of one dtype; they must stay where they are as long as this object is used.
    """

    def __init__(
        self,
        cell_name: str,
        batch: int,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor | None,
        bias_hh: Tensor | None,
        weight_hr: Tensor | None,
    ):
        dtype, state_size, input_size = weight_hh.dtype, weight_hh.shape[1], weight_ih.shape[1]
        size = state_size if weight_hr is None else weight_hr.shape[1]
        sizes = Sizes(
            *(cell_name, False, dtype, torch.get_num_threads(), batch, 1, batch, 1, 1),
            *(input_size, size, state_size, (0,), weight_hr is not None, False, 1),
        )
        plan = make_plan(sizes)
        call = copy_of(plan.call)
        scratch = torch.empty(plan.scratch_bytes, dtype=torch.uint8, device="cpu")
        panels = new_panels(plan) if plan.kept else None
        for memory, places in ((scratch, plan.regions), (panels, plan.kept)):
            for place, offset in places:
                call[place] = memory.data_ptr() + offset
        arrays = {
            **{field.WEIGHT_IH: weight_ih, field.WEIGHT_HH: weight_hh, field.WEIGHT_HR: weight_hr},
            **{field.BIAS_IH: bias_ih, field.BIAS_HH: bias_hh},
        }
        for place, tensor in arrays.items():
            if tensor is not None:
                call[place] = tensor.data_ptr()
        self.run = prepare_run(kernel(cell_name, False, dtype, weight_hr is not None), call, plan.threads)
        self.values = call
        # Threads that share the hidden units read one copy of the state and write another.
        self.shared = plan.members > 1
        self._keep = (scratch, panels, arrays)


class Step:
    """One step after another: the state, ``hidden`` (1, B, H') and ``cell`` (1, B, H), is changed in place."""

    def __init__(self, cell_name: str, weights: list[Tensor | None], hidden: Tensor, cell: Tensor | None):
        """``weights``: weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, None where absent."""
        prepared = _Prepared(cell_name, hidden.shape[1], *weights)
        self._run, self._values = prepared.run, prepared.values
        self._values[field.HIDDEN], self._values[field.CELL] = hidden.data_ptr(), 0 if cell is None else cell.data_ptr()
        self._states = [hidden, hidden.clone()] if prepared.shared else [hidden]
        self._keep = (prepared, hidden, cell)

    def settle(self) -> None:
        """Bring the state to where it was given: until the next call it may be read and changed there."""
        if len(self._states) > 1:
            given = self._keep[1]
            if self._states[0] is not given:
                given.copy_(self._states[0])
                self._states.reverse()

    def __call__(self, x: int, output: int) -> None:
        """Take a step for the input (B, I) at address ``x``, and write the hidden state to address ``output``."""
        values = self._values
        if len(self._states) > 1:
            self._states.reverse()
            values[field.HIDDEN], values[field.HIDDEN_2] = (state.data_ptr() for state in self._states)
            values[field.PART_BARRIERS] = 0
        values[X], values[OUTPUT] = x, output
        self._run()


class CellStep:
    """Steps of a cell, each with a state of its own."""

    def __init__(self, cell_name: str, batch: int, weights: list[Tensor | None]):
        """``weights``: weight_ih, weight_hh, bias_ih, bias_hh, None where absent."""
        prepared = _Prepared(cell_name, batch, *weights, None)
        self._run, self._values, self._keep = prepared.run, prepared.values, prepared

    def __call__(self, x: Tensor, hidden: Tensor, cell: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The state after the step for x (B, I), from hidden and cell (B, H), all contiguous; these are left alone."""
        values = self._values
        new_hidden = hidden.clone()
        if cell is not None:
            cell = cell.clone()
            values[field.CELL] = cell.data_ptr()
        if self._keep.shared:
            values[field.PART_BARRIERS] = 0
        values[X], values[field.HIDDEN_2] = x.data_ptr(), hidden.data_ptr()
        values[field.HIDDEN] = values[OUTPUT] = new_hidden.data_ptr()
        self._run()
        return new_hidden, cell
