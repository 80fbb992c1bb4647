"""The floor of a workload: the time below which this machine cannot run it, whatever the kernel.

The largest of three lower bounds:

- compute: the FLOPs of `Workload.flops`, at the measured rate of multiply-adds;
- memory: every input, weight and output moved once (in training their gradients too, and the input, weights
  and output once more, for backward needs them), at the measured rate of the level of memory that holds all;
- recurrent weights, on a CPU only: its registers do not hold W_hh, so that every time step reads it anew,
  forward and again backward, at the rate of the level of memory that holds it.

Activation functions, and what a kernel saves between forward and backward, are not counted: they can be hidden,
or computed again.
"""

import torch

from .machine import Machine
from .workloads import GATES, Workload


def floor_seconds(workload: Workload, dtype: torch.dtype, device: torch.device, machine: Machine) -> float:
    """The floor of one call, in seconds."""
    moved = bytes_moved(workload, dtype)
    bounds = [workload.flops / machine.flops, moved / machine.bandwidth(moved)]
    if device.type == "cpu":
        weight_hh = recurrent_weight_bytes(workload, dtype)
        passes = 2 if workload.mode == "train" else 1
        steps = passes * workload.layers * workload.time
        bounds.append(steps * weight_hh / machine.bandwidth(weight_hh))
    return max(bounds)


def bytes_moved(workload: Workload, dtype: torch.dtype) -> int:
    """Bytes of the input, the output, the weights and, for a single step, the state before and after it."""
    hidden = workload.directions * workload.hidden
    weights = sum(GATES[workload.cell] * hidden * (size + workload.hidden) for size in workload.layer_inputs)
    numbers = workload.rows * (workload.input + hidden) + weights
    if workload.mode == "train":
        numbers *= 3
    elif workload.mode == "step":
        states = 2 if workload.cell == "LSTM" else 1
        numbers += 2 * states * workload.layers * workload.batch * hidden
    return numbers * dtype.itemsize


def recurrent_weight_bytes(workload: Workload, dtype: torch.dtype) -> int:
    """Bytes of W_hh of one layer, all directions."""
    return GATES[workload.cell] * workload.hidden * workload.hidden * workload.directions * dtype.itemsize
