"""Compiles a kernel to machine code once, keeps it on disk, and runs it on the threads that torch uses.

A kernel is ``void kernel(int64_t *call)``: pointers and sizes in, nothing out. Numba's own disk cache is not
used because it looks at one source file only; here a change to any kernel source, to Numba or to the processor
gives another file name.

Threads are those of the OpenMP runtime that torch itself has loaded: Numba's own layers abort the process when
two Python threads enter them (workqueue) or in a forked child (GNU OpenMP).
"""

import ctypes
import functools
import hashlib
import marshal
import mmap
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import llvmlite
import numba
import torch
from numba import cfunc, types
from numba.core.registry import cpu_target

from ..dispatch import without_garbage_collection
from .numba_library import KernelCompiler
from .numba_team import TEAM_SIZE, YIELD

_SOURCES = tuple(
    Path(__file__).with_name(f"numba_{name}.py")
    for name in (
        *("library", "simd", "pairs", "team", "tile", "cells", "call", "scan", "gradients", "layer", "compile"),
        *("option_cells", "option_scan", "recurrence"),
    )
)
_SIGNATURE = types.void(types.CPointer(types.int64))

_lock = threading.Lock()
_addresses: dict[str, int] = {}
# Machine code is freed with the library that owns it: keep every one for the life of the process.
_libraries: list = []
_cache_warned = False


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``FASTRNN_CACHE_DIR``, or ``fastrnn`` in the user's cache folder."""
    chosen = os.environ.get("FASTRNN_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastrnn"


@functools.cache
def _fingerprint() -> str:
    digest = hashlib.sha256()
    for source in _SOURCES:
        digest.update(source.read_bytes())
    digest.update(
        repr((numba.__version__, llvmlite.__version__, cpu_target.target_context.codegen().magic_tuple())).encode()
    )
    return digest.hexdigest()[:24]


def _load(path: Path) -> int | None:
    """The address of the kernel stored at ``path``, or None if there is none or it is damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    checksum, payload = content[:32], content[32:]
    if hashlib.sha256(payload).digest() != checksum:
        return None
    symbol, library_data = marshal.loads(payload)
    library = cpu_target.target_context.codegen().unserialize_library(library_data)
    _libraries.append(library)
    return library.get_pointer_to_function(symbol)


def _save(path: Path, symbol: str, library) -> None:
    global _cache_warned
    payload = marshal.dumps((symbol, library.serialize_using_object_code()))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(payload).digest() + payload)
            os.replace(temporary, path)  # atomic: another process sees the whole file or none
        except OSError:
            os.unlink(temporary)  # a full disk must not fill up with halves
            raise
    except OSError as error:
        if not _cache_warned:
            _cache_warned = True
            warnings.warn(
                f"fastrnn cannot keep its compiled kernels in {path.parent} ({error}); every new process compiles them "
                "again. Set FASTRNN_CACHE_DIR to a folder that can be written to.",
                RuntimeWarning,
                stacklevel=2,
            )


def kernel_address(name: str, build: Callable[[], Callable]) -> int:
    """The address of kernel ``name``: from this process, from the disk, or compiled from what ``build`` returns."""
    address = _addresses.get(name)
    if address is None:
        with _lock, without_garbage_collection():
            address = _addresses.get(name)
            if address is None:
                cpu_target.target_context.refresh()
                path = cache_folder() / f"{name}-{_fingerprint()}.bin"
                address = _load(path)
                if address is None:
                    function = build()
                    function.__qualname__ = f"{function.__qualname__}.{name}"  # see named_jit
                    compiled = cfunc(_SIGNATURE, error_model="numpy", pipeline_class=KernelCompiler)(function)
                    _libraries.append(compiled._library)
                    _save(path, compiled.native_name, compiled._library)
                    address = compiled.address
                _addresses[name] = address
    return address


class _OpenMP(NamedTuple):
    """The functions of the OpenMP runtime that torch has loaded, and the address of the one that counts threads."""

    parallel: Callable
    team_size: int


def _find_openmp() -> _OpenMP | None:
    """None where there is no such runtime: then kernels run on one thread."""
    for library in (None, *sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*"))):
        try:
            runtime = ctypes.CDLL(library)
            parallel, team_size = runtime.GOMP_parallel, runtime.omp_get_num_threads
        except (OSError, AttributeError):
            continue
        parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        parallel.restype = None
        return _OpenMP(parallel, ctypes.cast(team_size, ctypes.c_void_p).value)
    return None


def _address_of_yield() -> int:
    try:
        return ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value
    except (OSError, AttributeError, TypeError):
        return 0


_openmp = _find_openmp()
_yield = _address_of_yield()
_MADV_HUGEPAGE = 14
# From here on memory is worth a request to the system for large pages.
LARGE = 4 << 20


@functools.cache
def _find_madvise():
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError, TypeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def use_large_pages(tensor: torch.Tensor) -> None:
    """Ask Linux to back a large new tensor with large pages: on first use each page costs more than its arithmetic."""
    size = tensor.numel() * tensor.element_size()
    if size < LARGE or sys.platform != "linux" or (advise := _find_madvise()) is None:
        return
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    advise(start, (tensor.data_ptr() + size - start) // page * page, _MADV_HUGEPAGE)


_forked = False


def _after_fork() -> None:
    # The parent's OpenMP threads do not exist here: waiting for them hangs, in torch's own operators as in ours.
    # One thread, as DataLoader gives its workers, works. A thread of the parent may have held the lock.
    global _forked, _lock
    _forked = True
    _lock = threading.Lock()
    torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def new_call(values: Sequence[int]) -> ctypes.Array:
    """An array of int64 that a kernel can be called with."""
    return _array_type(len(values))(*values)


def copy_of(call: ctypes.Array) -> ctypes.Array:
    """The same call once more: a fraction of what it takes to make one of Python's numbers."""
    return type(call).from_buffer_copy(call)


def run(address: int, call: ctypes.Array, threads: int) -> None:
    """Run the kernel at ``address`` on ``call`` with up to ``threads`` threads, without the GIL."""
    prepare_run(address, call, threads)()


def prepare_run(address: int, call: ctypes.Array, threads: int) -> Callable[[], None]:
    """A function that does what ``run`` does. The call must be kept as long as it is used; its values may change."""
    pointer = ctypes.addressof(call)
    if threads > 1 and _openmp is not None and not _forked:
        call[TEAM_SIZE], call[YIELD] = _openmp.team_size, _yield
        return functools.partial(_openmp.parallel, address, pointer, threads, 0)
    return functools.partial(_function(address), pointer)


_function = functools.cache(ctypes.CFUNCTYPE(None, ctypes.c_void_p))


@functools.cache
def _array_type(length: int):
    return ctypes.c_int64 * length
