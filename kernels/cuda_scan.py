"""The time loops of csrc/: which kernel a layer takes, what it is given, and what its errors mean.

Regime S: one block has all hidden units of some sequences, with their weights in registers. Regime L: the units are
spread over many blocks that wait for each other, so that all must be resident: ``can_run`` asks what the device has.
"""

import ctypes
import functools
import importlib
import threading
from pathlib import Path

import torch
from torch import Tensor

from ..options import STEP_OPTIONS
from . import cuda_build, gpu_layer
from .gpu_layer import Backward, Forward, Scan, direction_bits, on

# Sequences of a tile of the batch; hidden units of a block of regime L.
COLUMNS, UNITS = 8, 16
# What csrc/ calls the dtypes, and elements of sixteen bytes of each. float32 multiplies in TF32, or as 3.
TYPES = {torch.bfloat16: (0, 8), torch.float16: (1, 8), torch.float32: (2, 4)}
EXACT_FLOAT32 = 3


@functools.cache
def _library():
    """The compiled module; a test may put the one that runs on the host in its place."""
    return importlib.import_module("fastrnn._cuda")


def unavailable() -> str | None:
    """Why this backend cannot run anything here, or None."""
    try:
        library = _library()
    except ImportError as error:
        return f"fastrnn was installed without its CUDA kernels ({error}); nvcc must be there when it is built"
    if not library.HOST_RUN:
        # a module from before it said what it was built of is of other sources
        outdated = cuda_build.why_outdated(getattr(library, "BUILT_OF", None), Path(__file__).parents[2])
        if outdated:
            return outdated
        if not torch.cuda.is_available():
            return "torch finds no GPU"
    if torch.version.hip is not None:
        return "its kernels are for NVIDIA's GPUs"
    return None


@functools.cache
def _limits(device: torch.device) -> tuple[int, int]:
    """How many blocks a device runs side by side, one on each multiprocessor, and the shared memory of one."""
    if _library().HOST_RUN:
        return 64, 227 << 10
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


def _no_image(device: torch.device) -> str | None:
    """Why the module has no code for a device, or None if it has."""
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return "it needs a GPU of compute capability 8.0 or newer"
    library = _library()
    return cuda_build.why_no_image(library.IMAGES.split(), library.PTX, capability)


def _type(dtype: torch.dtype) -> int:
    if dtype == torch.float32 and not gpu_layer.tf32_is_allowed():
        return EXACT_FLOAT32
    return TYPES[dtype][0]


def can_run(call) -> str | None:
    """Why this backend cannot run ``call``, or None if it can."""
    reason = unavailable()
    if reason:
        return reason
    on_host = _library().HOST_RUN
    if call.device != ("cpu" if on_host else "cuda"):
        return f"it runs on an NVIDIA GPU, the input is on {call.device}"
    if call.dtype not in TYPES:
        return f"it computes in bfloat16, float16 and float32, the input is {call.dtype}"
    if call.proj_size:
        return "its kernels have no projections (proj_size)"
    if call.options and (missing := STEP_OPTIONS.intersection(call.options)):
        return f"its kernels have no {', '.join(sorted(missing))}"
    device = torch.device("cpu") if on_host else torch.device("cuda", torch.cuda.current_device())
    if not on_host and (reason := _no_image(device)):
        return reason
    kind = _type(call.dtype)
    return next(
        filter(None, (_obstacle(call.cell, kind, way, call.hidden_size, device) for way in (False, True))), None
    )


def _fits(cell: str, kind: int, backward: bool, spread: bool, tiles: int, size: int, device: torch.device) -> bool:
    grid = _library().grid(cell, kind, backward, spread, tiles, size)
    return grid is not None and grid[2] <= _limits(device)[1]


def _obstacle(cell: str, kind: int, backward: bool, size: int, device: torch.device) -> str | None:
    """Why a device can run a layer of this size in neither regime, or None."""
    if _fits(cell, kind, backward, False, 1, size, device):
        return None
    blocks_at_once, most_shared = _limits(device)
    blocks, _, shared = _library().grid(cell, kind, backward, True, 1, size)
    if blocks > blocks_at_once:
        return f"{size} hidden units need {blocks} multiprocessors, there are {blocks_at_once}"
    if shared > most_shared:
        return f"{size} hidden units need {shared} bytes of shared memory, there are {most_shared}"
    return None


@functools.lru_cache(maxsize=1024)
def _choose(cell: str, kind: int, backward: bool, size: int, batch_tiles: int, groups: int, device: torch.device):
    """Whether units are spread over blocks, tiles of sequences of a block, and teams of blocks.

    A block takes a second tile of sequences only if all are then done in fewer turns: a step takes longer with two,
    but not twice as long.
    """
    # asked again: the TF32 switch, or the device, may be another than when the backend was chosen
    obstacle = _obstacle(cell, kind, backward, size, device)
    if obstacle:
        raise RuntimeError(f"fastrnn: the backend 'cuda' cannot run this layer on {device}: {obstacle}")
    spread = not _fits(cell, kind, backward, False, 1, size, device)
    blocks_at_once, _ = _limits(device)
    places = max(1, blocks_at_once // -(-size // UNITS)) if spread else blocks_at_once

    def tasks(tiles):
        return groups * -(-batch_tiles // tiles)

    fewer_turns = -(-tasks(2) // places) < -(-tasks(1) // places)
    tiles = 2 if fewer_turns and _fits(cell, kind, backward, spread, 2, size, device) else 1
    return spread, tiles, min(places, tasks(tiles)) if spread else 0


class Failure:
    """A word in the host's memory for each device, which a kernel sets that has waited in vain."""

    def __init__(self):
        self._words: dict[torch.device, ctypes.c_uint32] = {}
        self._lock = threading.Lock()

    def address(self, device: torch.device) -> int:
        """Where the word of ``device``, the current one, is, after a look at it.

        Raises:
            RuntimeError: an earlier launch gave up; its results are NaN.
        """
        with self._lock:
            if device not in self._words:
                self._words[device] = ctypes.c_uint32.from_address(_library().host_word())
            word = self._words[device]
        if word.value:
            word.value = 0
            raise RuntimeError(
                f"fastrnn: an earlier launch on {device} gave up waiting for blocks that should have run beside it: "
                "its results are NaN. Choose another backend with fastrnn.use_backend or FASTRNN_BACKEND."
            )
        return ctypes.addressof(word)


failure = Failure()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _run(scan: Scan, backward: bool, weights: Tensor, state, exchanged: Tensor, **tensors: Tensor | None) -> None:
    """Launch a scan. ``exchanged``: the tensor (rows, .., H) in which blocks publish what others wait for."""
    size, device = scan.hidden_size, scan.device
    kind, lane = _type(scan.dtype), TYPES[scan.dtype][1]
    batch_tiles = -(-scan.batch // COLUMNS)
    spread, tiles, teams = _choose(scan.cell, kind, backward, size, batch_tiles, scan.groups, device)
    hidden, cell_state = state
    exchange = initial = None
    stride = -(-size // lane) * lane
    if spread:
        if stride == size:
            exchange = exchanged
        else:
            exchange = exchanged.new_empty(exchanged.numel() // size, stride)
        # all ones: nothing was published there yet
        exchange.view(torch.int32 if exchange.dtype == torch.float32 else torch.int16).fill_(-1)
        if not backward:
            initial = hidden.new_zeros(scan.groups, scan.batch, stride, dtype=scan.dtype)
            initial[:, :, :size] = hidden
    reverse, period = direction_bits(scan.reverse)
    on_gpu = device.type == "cuda"
    with on(device):
        _library().scan(
            cell=scan.cell,
            type=kind,
            backward=backward,
            spread=spread,
            tiles=tiles,
            teams=teams,
            stream=torch.cuda.current_stream(device).cuda_stream if on_gpu else 0,
            weights=weights.data_ptr(),
            offsets=_address(scan.offsets),
            resets=_address(scan.resets),
            exchange=_address(exchange),
            initial=_address(initial),
            hidden=hidden.data_ptr(),
            cell_state=_address(cell_state),
            failure=failure.address(device),
            groups=scan.groups,
            batch=scan.batch,
            steps=scan.steps,
            size=size,
            stride=stride,
            reverse=reverse,
            period=period,
            **{name: _address(tensor) for name, tensor in tensors.items()},
        )


def _forward_scan(scan: Scan, tensors: Forward) -> None:
    _run(
        scan,
        False,
        tensors.weight_hh,
        (tensors.hidden, tensors.cell),
        tensors.output,
        bias_hn=tensors.bias_hn,
        gates_x=tensors.gates_x,
        output=tensors.output,
        gates=tensors.gates,
        hidden_prev=tensors.hidden_prev,
        cell_prev=tensors.cell_prev,
        cells=tensors.cells,
        dgates=None,
    )


def _backward_scan(scan: Scan, tensors: Backward) -> None:
    size = scan.hidden_size
    transposed = tensors.weight_hh.view(scan.groups, -1, size, size).transpose(2, 3).contiguous()
    _run(
        scan,
        True,
        transposed,
        (tensors.d_hidden, tensors.d_cell),
        tensors.dgates,
        bias_hn=None,
        gates_x=None,
        output=tensors.d_output,
        gates=tensors.gates,
        hidden_prev=tensors.hidden_prev,
        cell_prev=tensors.cell_prev,
        cells=tensors.d_cells,
        dgates=tensors.dgates,
    )


layer_forward = functools.partial(gpu_layer.layer_forward, _forward_scan)
layer_backward = functools.partial(gpu_layer.layer_backward, _backward_scan)
