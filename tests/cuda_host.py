"""The CUDA kernels without a GPU: builds csrc/ for the CPU (csrc/host_run.h) and lets fastrnn run it."""

import contextlib
import importlib.util
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11
import torch

from fastrnn import dispatch
from fastrnn.kernels import cuda_scan

CSRC = Path(__file__).parents[1] / "csrc"
SOURCES = ("lstm.cu", "gru.cu", "rnn.cu", "error.cu", "bindings.cpp")


def build(folder: Path, kept_chunks: int | None = None) -> ModuleType:
    """Compile the kernels into a module in ``folder``; ``kept_chunks``: weights that a warp keeps in its registers."""
    name = "_cuda_host" if kept_chunks is None else f"_cuda_host_{kept_chunks}"
    flags = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-DFASTRNN_HOST_RUN"]
    flags += [f"-DFASTRNN_MODULE={name}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    if kept_chunks is not None:
        flags.append(f"-DFASTRNN_KEPT_CHUNKS={kept_chunks}")

    def compile(source):
        target = folder / f"{name}_{source}.o"
        subprocess.run(["g++", "-x", "c++", *flags, "-c", CSRC / source, "-o", target], check=True, timeout=600)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile, SOURCES))
    library = folder / f"{name}.so"
    subprocess.run(["g++", "-shared", *objects, "-o", library], check=True, timeout=100)
    spec = importlib.util.spec_from_file_location(name, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def installed(module: ModuleType) -> Iterator[None]:
    """Run the backend "cuda" by ``module`` on the CPU's tensors, with products of float32 as exact as torch's there."""
    library, tf32 = cuda_scan._library, torch.backends.cudnn.allow_tf32
    caches = dispatch._select, dispatch._unavailable, cuda_scan._limits, cuda_scan._choose
    cuda_scan._library = lambda: module
    torch.backends.cudnn.allow_tf32 = False
    for cache in caches:
        cache.cache_clear()
    module.set_schedule()
    try:
        yield
    finally:
        cuda_scan._library = library
        torch.backends.cudnn.allow_tf32 = tf32
        for cache in caches:
            cache.cache_clear()


@contextlib.contextmanager
def cut(spread: bool, tiles: int, teams: int = 1) -> Iterator[None]:
    """Cut up every scan in one way, whatever the cost model says."""
    choose = cuda_scan._choose
    cuda_scan._choose = lambda *_: (spread, tiles, teams)
    try:
        yield
    finally:
        cuda_scan._choose = choose
