"""The Triton backend: chooses the tiles of ``triton_scan.py``'s time loops, allocates what they need, launches."""

import functools

import torch
import triton
from torch import Tensor

from ..options import STEP_OPTIONS
from ..reference import CELLS
from . import gpu_layer
from .gpu_layer import Backward, Forward, Scan, direction_bits, on
from .triton_scan import INTERPRETED, backward_scan, forward_scan
from .triton_tiles import AMD, AMPERE, HOPPER, WARPS, Limits, choose_tiles, registers_without_spills


@functools.cache
def _limits(device: torch.device) -> Limits:
    if INTERPRETED:
        return HOPPER._replace(cooperative=False)
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    programs, shared_bytes = properties["multiprocessor_count"], properties["max_shared_mem"]
    if torch.version.hip is not None:
        # In Triton 3.9 other waves' stores may still be under way when one wave's release counts them as done: nobody
        # waits inside a launch, each step is one of its own.
        return Limits(programs, shared_bytes, False, AMD.most_alone, AMD.most_rows)
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    return Limits(programs, shared_bytes, True, HOPPER.most_alone, (HOPPER if hopper else AMPERE).most_rows)


def _precision(dtype: torch.dtype) -> str:
    """How products of float32 are computed: as torch's own recurrent layers do."""
    tf32 = (
        dtype == torch.float32 and gpu_layer.tf32_is_allowed() and not INTERPRETED.value and torch.version.hip is None
    )
    return "tf32" if tf32 else "ieee"


def can_run(call) -> str | None:
    """Why this backend cannot run ``call``, or None if it can."""
    if call.device != "cuda" and not (INTERPRETED and call.device == "cpu"):
        return f"it runs on a GPU (or, under TRITON_INTERPRET=1, on the CPU), the input is on {call.device}"
    if call.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"it computes in floating point, the input is {call.dtype}"
    if call.proj_size:
        return "its kernels have no projections (proj_size)"
    if call.options and (missing := STEP_OPTIONS.intersection(call.options)):
        return f"its kernels have no {', '.join(sorted(missing))}"
    return None


# The second dimension of a CUDA grid ends here.
MOST_PAIRS = 65535


def _launch(scan: Scan, kernel, tensors: tuple[Tensor | None, ...], rounds: int, **options) -> None:
    """Launch ``kernel`` on ``tensors`` for all rounds: at once, or one by one where programs may not wait."""
    limits = _limits(scan.device)
    backward = kernel is backward_scan
    itemsize = scan.dtype.itemsize
    tiles = choose_tiles(scan.cell, backward, scan.hidden_size, scan.groups, -(-scan.batch // 16), itemsize, limits)
    rounds += backward and not tiles.alone  # the last product
    blocks, batch_tiles = tiles.blocks(scan.hidden_size), -(-scan.batch // tiles.rows)
    pairs = scan.groups * batch_tiles
    together = tiles.alone or blocks == 1 or (limits.cooperative and blocks <= limits.programs)
    # nobody looks at them where a program is alone or a launch makes one step
    make = torch.zeros if together and not tiles.alone else torch.empty
    counters = make(pairs * 32, dtype=torch.int32, device=scan.device)
    waiting = together and blocks > 1
    at_once = min(pairs, max(1, limits.programs // blocks) if waiting else MOST_PAIRS)
    if waiting:
        options["launch_cooperative_grid"] = True
        if rounds * blocks >= 1 << 31:
            raise RuntimeError(f"fastrnn: {rounds} steps are more than the counters of {blocks} programs can count")
    options |= {
        "PACKED": scan.offsets is not None,
        "PRECISION": _precision(scan.dtype),
        "EXACT": scan.dtype in (torch.float32, torch.float64),
        "num_warps": WARPS,
        # a pipeline would read hidden states ahead of the step that writes them
        "num_stages": 1,
    }
    cell, directions = CELLS[scan.cell], direction_bits(scan.reverse)
    constants = (
        *(scan.cell, scan.hidden_size, cell.gates, cell.saved),
        *(tiles.rows, tiles.units, tiles.splits, tiles.chunk, tiles.chunks, tiles.resident),
        *(tiles.in_flight, tiles.alone),
    )
    for first_pair in range(0, pairs, at_once):
        grid = (blocks, min(at_once, pairs - first_pair))
        for begin in range(0, rounds, rounds if together else 1):
            end = rounds if together else begin + 1
            arguments = (
                *(*tensors, counters, scan.groups, scan.batch, scan.steps),
                *(begin, end, first_pair, batch_tiles, *directions, *constants),
            )
            kernel[grid](*arguments, **options, **_registers(scan, kernel, arguments, constants, grid, options))


def _registers(scan: Scan, kernel, arguments, constants, grid, options) -> dict[str, int]:
    """The option that keeps ``kernel`` from spilling; each of its variants is compiled and looked at once."""
    if INTERPRETED or torch.version.hip is not None:
        return {}
    variant = (kernel, scan.device, scan.dtype, constants, *options.items())
    if variant not in _REGISTERS:

        def spills(registers):
            compiled = kernel.warmup(*arguments, grid=grid, maxnreg=registers, **options)
            compiled._init_handles()
            return compiled.n_spills

        _REGISTERS[variant] = registers_without_spills(spills)
    return {"maxnreg": _REGISTERS[variant]}


# Of every variant of a kernel that has been launched.
_REGISTERS: dict[tuple, int | None] = {}


def _forward_scan(scan: Scan, tensors: Forward) -> None:
    gates_x, weight_hh, bias_hn, hidden, cell, *results = tensors
    exchange = gates_x.new_empty(2, scan.groups, scan.batch, scan.hidden_size)
    exchange[0] = hidden
    arguments = (gates_x, weight_hh, bias_hn, scan.offsets, scan.resets, exchange, hidden, cell, *results)
    options = {"WITH_RESETS": scan.resets is not None, "WITH_CELLS": tensors.cells is not None}
    with on(scan.device):
        _launch(scan, forward_scan, arguments, scan.steps, SAVE=tensors.gates is not None, **options)


def _backward_scan(scan: Scan, tensors: Backward) -> None:
    *read, weight_hh, dgates, d_hidden, d_cell = tensors
    arguments = (*read, weight_hh, scan.offsets, scan.resets, dgates, d_hidden, d_cell)
    options = {"WITH_RESETS": scan.resets is not None, "WITH_D_CELLS": tensors.d_cells is not None}
    with on(scan.device):
        _launch(scan, backward_scan, arguments, scan.steps, WITH_D_OUTPUT=tensors.d_output is not None, **options)


layer_forward = functools.partial(gpu_layer.layer_forward, _forward_scan)
layer_backward = functools.partial(gpu_layer.layer_backward, _backward_scan)
