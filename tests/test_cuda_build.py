"""The CUDA kernels compile for every GPU they claim, within its registers, and the build says what it does."""

import os
import shutil
import subprocess
import sys

import pytest
from test_packaging import ROOT, copy_tree

from bench.cuda_kernels import ARCHS, build, load, table
from bench.gpu_experiments import __main__ as gpu_experiments
from fastrnn.kernels.cuda_build import fingerprint, why_no_image, why_outdated

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc to compile csrc/ with")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build(tmp_path_factory.mktemp("build"))


def setup(tree, *arguments, **environment):
    inherited = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "FASTRNN_BUILD_CUDA")}
    command = [sys.executable, "setup.py", *(arguments or ("build_ext", "--inplace"))]
    return subprocess.run(command, cwd=tree, env=inherited | environment, capture_output=True, text=True, timeout=100)


@needs_nvcc
def test_every_kernel_compiles_without_warnings_and_spills(built):
    kernels, _ = built
    # cells x types x passes x regimes x tiles, but for float32 with two tiles of a block that is alone
    assert len(kernels) == len(ARCHS) * 3 * 2 * (4 * 2 * 2 - 1)
    assert {kernel.arch for kernel in kernels} == set(ARCHS)
    assert [kernel for kernel in kernels if kernel.spilled] == []


@needs_nvcc
def test_the_module_imports_without_a_gpu(built):
    kernels, library = built
    module = load(library)
    assert not module.HOST_RUN
    built = module.BUILT_OF, module.IMAGES, module.PTX
    assert built == (fingerprint(ROOT / "csrc"), " ".join(ARCHS), "90")
    assert len(table(kernels, module).splitlines()) == 2 + 3 * (4 * 2 * 2 - 1)
    # blocks, threads, bytes of shared memory
    assert module.grid("lstm", 0, False, False, 1, 128) == (1, 256, 2 * 8 * (4 * 16 + 16) * 4)
    assert module.grid("lstm", 0, False, False, 1, 129) is None
    blocks, threads, shared = module.grid("lstm", 0, True, True, 1, 2048)
    assert (blocks, threads) == (128, 256) and shared <= 227 << 10


@needs_nvcc
def test_the_backend_says_why_it_is_not_available(built, tmp_path):
    _, library = built
    tree = copy_tree(tmp_path / "tree")
    script = "import fastrnn; print({info.name: (info.available, info.reason) for info in fastrnn.backends()}['cuda'])"
    environment = {name: value for name, value in os.environ.items() if name != "FASTRNN_BACKEND"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(tree)}
    command = [sys.executable, "-c", script]
    before = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=True).stdout
    assert before.startswith("(False, ") and "without its CUDA kernels" in before
    shutil.copy(library, tree / "fastrnn")
    after = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=True).stdout
    assert after.startswith("(False, ") and "torch finds no GPU" in after
    with open(tree / "csrc" / "cells.cuh", "a") as file:
        file.write("// another line\n")
    outdated = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=True).stdout
    assert outdated.startswith("(False, ") and "python setup.py build_ext --inplace" in outdated


def test_a_module_of_other_sources_is_outdated(tmp_path):
    csrc = tmp_path / "csrc"
    assert why_outdated("any", tmp_path) is None  # installed: there are no sources
    csrc.mkdir()
    (csrc / "other.cpp").write_text("of another package")
    assert why_outdated("any", tmp_path) is None
    (csrc / "scan.cuh").write_text("ab")
    (csrc / "scan.cuh.orig").write_text("no source")
    built_of = fingerprint(csrc)
    assert why_outdated(built_of, tmp_path) is None
    (csrc / "scan.cuh.orig").unlink()
    assert why_outdated(built_of, tmp_path) is None
    (csrc / "scan.cuh").write_text("abc")
    for outdated in (built_of, None):
        assert "python setup.py build_ext --inplace" in why_outdated(outdated, tmp_path)


@pytest.mark.parametrize(
    ("images", "ptx", "runs", "fails"),
    [
        # an image runs on later GPUs of its major version, PTX on all later ones
        ("80", "80", [(8, 0), (8, 6), (9, 0), (12, 0)], [(7, 5)]),
        ("80 90 100", "90", [(8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 1)], [(7, 5)]),
        ("86 100", "100", [(8, 6), (8, 9), (10, 0), (12, 0)], [(8, 0), (9, 0)]),
        # architecture-specific: that GPU alone
        ("90a", "90a", [(9, 0)], [(8, 9), (10, 0)]),
        ("103a", "103a", [(10, 3)], [(10, 0), (12, 0)]),
    ],
)
def test_a_gpu_without_an_image_is_told_what_there_is(images, ptx, runs, fails):
    images = images.split()
    assert [capability for capability in runs if why_no_image(images, ptx, capability)] == []
    for major, minor in fails:
        reason = why_no_image(images, ptx, (major, minor))
        assert f"sm_{images[0]}" in reason and f"the GPU is sm_{major}{minor}" in reason
        assert f"FASTRNN_CUDA_ARCHS={major}{minor} " in reason


def test_without_nvcc_the_build_goes_on_or_fails_as_asked(tmp_path):
    tree = copy_tree(tmp_path / "tree")
    nowhere = {"CUDA_HOME": str(tmp_path / "nowhere")}
    for choice in ({}, {"FASTRNN_BUILD_CUDA": "auto"}):
        done = setup(tree, **nowhere, **choice)
        assert done.returncode == 0, done.stderr
        assert "not built (missing: nvcc" in done.stdout
    done = setup(tree, **nowhere, FASTRNN_BUILD_CUDA="1")
    assert done.returncode != 0
    assert "FASTRNN_BUILD_CUDA is 1" in done.stderr and "nvcc" in done.stderr
    done = setup(tree, FASTRNN_BUILD_CUDA="0")
    assert done.returncode == 0 and "not built (FASTRNN_BUILD_CUDA is 0)" in done.stdout
    done = setup(tree, FASTRNN_BUILD_CUDA="yes")
    assert done.returncode != 0 and "'yes'" in done.stderr
    assert not list((tree / "fastrnn").glob("*.so"))


@needs_nvcc
def test_a_build_that_fails_is_fatal_only_if_it_was_asked_for(tmp_path):
    tree = copy_tree(tmp_path / "tree")
    done = setup(tree, FASTRNN_CUDA_FLAGS="--no-such-flag")
    assert done.returncode == 0 and "were not built" in done.stdout + done.stderr
    done = setup(tree, FASTRNN_CUDA_FLAGS="--no-such-flag", FASTRNN_BUILD_CUDA="1")
    assert done.returncode != 0 and "were not built" in done.stdout + done.stderr


@needs_nvcc
@pytest.mark.parametrize("source", gpu_experiments.SOURCES, ids=lambda source: source.stem)
def test_the_experiments_compile_without_warnings(source, tmp_path):
    """For the GPU that has all they measure; they have no other test before someone has it at hand."""
    assert gpu_experiments.compile(source, "90a", tmp_path).is_file()


def test_the_sources_name_no_torch():
    for source in (ROOT / "csrc").iterdir():
        assert not [line for line in source.read_text().splitlines() if line.startswith("#include") and "torch" in line]
