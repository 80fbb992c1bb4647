"""One time step after another: the forward call of one layer, prepared once and run again and again.

The weights are read where the module keeps them, so that a change is seen at once and nothing has to be packed: a
single step is bound by the speed at which they can be read.
"""

import torch
from torch import Tensor

from . import numba_call as field
from .numba_call import OUTPUT, X
from .numba_compile import prepare_run
from .numba_layer import Sizes, kernel, make_plan


class Step:
    """One step of a layer of one direction, in float32 or float64.

    The state, ``hidden`` (1, B, H') and ``cell`` (1, B, H), is changed in place, see ``settle``. Weights are contiguous
    and of the state's dtype; they must stay where they are as long as this object is used.
    """

    def __init__(
        self,
        cell_name: str,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor | None,
        bias_hh: Tensor | None,
        weight_hr: Tensor | None,
        hidden: Tensor,
        cell: Tensor | None,
    ):
        _, batch, state_size = hidden.shape
        input_size = weight_ih.shape[1]
        size = state_size if weight_hr is None else weight_hr.shape[1]
        sizes = Sizes(
            *(cell_name, False, hidden.element_size(), torch.get_num_threads(), batch, 1, batch, 1, 1),
            *(input_size, size, state_size, (0,), weight_hr is not None, False, 1),
        )
        plan = make_plan(sizes)
        call = list(plan.values)
        scratch = torch.empty(plan.scratch_bytes, dtype=torch.uint8, device="cpu")
        for place, offset in plan.regions:
            call[place] = scratch.data_ptr() + offset
        # Threads that share the hidden units read one copy of the state and write the other.
        self._states = [hidden, hidden.clone()] if plan.members > 1 else [hidden]
        arrays = {
            **{field.WEIGHT_IH: weight_ih, field.WEIGHT_HH: weight_hh, field.WEIGHT_HR: weight_hr},
            **{field.BIAS_IH: bias_ih, field.BIAS_HH: bias_hh, field.CELL: cell, field.HIDDEN: hidden},
        }
        for place, tensor in arrays.items():
            if tensor is not None:
                call[place] = tensor.data_ptr()
        self._run, self._values = prepare_run(kernel(cell_name, False, hidden.element_size()), call, plan.threads)
        self._keep = (scratch, arrays)

    def settle(self) -> None:
        """Bring the state to where it was given: until the next call it may be read and changed there."""
        if len(self._states) > 1:
            given = self._keep[1][field.HIDDEN]
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
