"""Builds the CUDA kernels of csrc/ into fastrnn/_cuda, with nvcc, pybind11 and ninja; pyproject.toml holds the rest.

Torch takes no part, so that one build serves every release of it, and needs no GPU. The environment chooses:

FASTRNN_BUILD_CUDA  1 builds or fails, 0 does not build, auto (if unset) builds where it can and says what it chose.
CUDA_HOME           where CUDA is; else the nvcc on the path is taken.
FASTRNN_CUDA_FLAGS  more flags for nvcc.
MAX_JOBS            how many files to compile at a time.
FASTRNN_CUDA_ARCHS  the GPUs to build for; if unset "80 90 100", as far as nvcc knows them. Newer ones get PTX, from 90
                    or the first.
"""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
fingerprint = runpy.run_path(str(ROOT / "fastrnn" / "kernels" / "cuda_build.py"))["fingerprint"]
ARCHS = ("80", "90", "100")
SOURCES = ("lstm.cu", "gru.cu", "rnn.cu", "error.cu", "bindings.cpp")

NINJA = """
rule compile
  command = {nvcc} {flags} $defines -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {nvcc} -shared --cudart static $in -o $out
"""


def find_nvcc() -> Path | None:
    home = os.environ.get("CUDA_HOME")
    if home:
        nvcc = Path(home, "bin", "nvcc")
        return nvcc if nvcc.is_file() else None
    found = shutil.which("nvcc")
    return None if found is None else Path(found)


def why_not_to_build() -> str | None:
    """Why the kernels are not built, or None if they are."""
    asked = os.environ.get("FASTRNN_BUILD_CUDA", "auto")
    if asked not in ("0", "1", "auto"):
        sys.exit(f"FASTRNN_BUILD_CUDA should be 0, 1 or auto, got {asked!r}")
    if asked == "0":
        return "FASTRNN_BUILD_CUDA is 0"
    missing = []
    if sys.platform != "linux":
        missing.append("Linux")
    if find_nvcc() is None:
        missing.append("nvcc: set CUDA_HOME to where CUDA is, or put nvcc on the path")
    for module in ("pybind11", "ninja"):
        try:
            __import__(module)
        except ImportError:
            missing.append(f"the Python package {module}")
    if missing and asked == "1":
        sys.exit(f"FASTRNN_BUILD_CUDA is 1, and these are missing: {'; '.join(missing)}")
    return f"missing: {'; '.join(missing)}" if missing else None


def chosen_archs(nvcc: Path) -> list[str]:
    """The GPUs to build for: those that were asked for, or as many of the usual ones as nvcc knows."""
    if asked := os.environ.get("FASTRNN_CUDA_ARCHS"):
        return asked.replace(",", " ").split()
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    return [arch for arch in ARCHS if f"compute_{arch}" in known]


class Build(build_ext):
    """Compiles the sources in parallel and links them, by a file for ninja."""

    def build_extension(self, ext):
        import ninja
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        archs = chosen_archs(find_nvcc())
        ptx = "90" if "90" in archs else archs[0]
        flags = [
            *("-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall", "-DFASTRNN_MODULE=_cuda"),
            *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs),
            f"-gencode=arch=compute_{ptx},code=compute_{ptx}",
            *(f'-I"{path}"' for path in [pybind11.get_include(), *self.include_dirs]),
        ]
        flags.append(os.environ.get("FASTRNN_CUDA_FLAGS", ""))
        text = NINJA.format(nvcc=f'"{find_nvcc()}"', flags=" ".join(flags))

        def escaped(path):
            return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

        objects = []
        for source in SOURCES:
            objects.append(escaped(folder / f"{source}.o"))
            text += f"build {objects[-1]}: compile {escaped(CSRC / source)}\n"
            if source == "bindings.cpp":
                # what cuda_build.py asks for; no other file's flags, or all would be compiled again for any change
                built = {"BUILT_OF": fingerprint(CSRC), "IMAGES": " ".join(archs), "PTX": ptx}
                defines = " ".join(f"'-DFASTRNN_{name}=\"{value}\"'" for name, value in built.items())
                text += f"  defines = {defines}\n"
        text += f"build {escaped(target)}: link {' '.join(objects)}\n"
        (folder / "build.ninja").write_text(text)
        print(f"fastrnn: building the CUDA kernels for {', '.join(archs)} into {target}", flush=True)
        try:
            jobs = [f"-j{os.environ['MAX_JOBS']}"] if "MAX_JOBS" in os.environ else []
            subprocess.run([Path(ninja.BIN_DIR, "ninja"), "-C", folder, *jobs], check=True)
        except subprocess.CalledProcessError as error:
            # setuptools goes on without an optional extension
            raise CompileError(f"fastrnn: the CUDA kernels were not built: {error}") from error


reason = why_not_to_build()
if "build_ext" in sys.argv or "bdist_wheel" in sys.argv or "editable_wheel" in sys.argv:
    print("fastrnn: the CUDA kernels are " + (f"not built ({reason})" if reason else "built"), flush=True)
sources = [f"csrc/{name}" for name in SOURCES]
optional = os.environ.get("FASTRNN_BUILD_CUDA", "auto") == "auto"
extension = Extension("fastrnn._cuda", sources, optional=optional)
setup(ext_modules=[] if reason else [extension], cmdclass={"build_ext": Build})
