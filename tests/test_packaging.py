"""The package as a user gets it: a checkout, an editable install, a wheel, a wheel built from the sdist."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import numba
import numpy
import pytest
import torch

import fastrnn

ROOT = Path(__file__).resolve().parents[1]
CLEARED = ("PYTHONPATH", "PYTHONHOME", "FASTRNN_BACKEND")
ASK_SITE_PACKAGES = "import sysconfig; print(sysconfig.get_path('purelib'))"

TRAINS_LIKE_TORCH = """
import pathlib, sys
import torch
import fastrnn, fastrnn.kernels

assert pathlib.Path(fastrnn.__file__).is_relative_to(sys.argv[1]), fastrnn.__file__
torch.set_num_threads(1)
torch.manual_seed(0)
ours = fastrnn.LSTM(5, 7, num_layers=2, bidirectional=True).double()
theirs = torch.nn.LSTM(5, 7, num_layers=2, bidirectional=True).double()
theirs.load_state_dict(ours.state_dict())
inputs = torch.randn(3, 2, 5, dtype=torch.float64)
for module in (ours, theirs):
    module.input = inputs.clone().requires_grad_()
    module.output, (module.h_n, module.c_n) = module(module.input)
    (module.output.square().sum() + module.h_n.sum() + module.c_n.sum()).backward()
for name in ("output", "h_n", "c_n"):
    torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
torch.testing.assert_close(ours.input.grad, theirs.input.grad)
for (name, our_weight), their_weight in zip(ours.named_parameters(), theirs.parameters(), strict=True):
    torch.testing.assert_close(our_weight.grad, their_weight.grad, msg=lambda text: f"{name}: {text}")
print(fastrnn.__version__)
"""

IMPORT_COST = """
import sys, time
import torch

before = set(sys.modules)
start = time.perf_counter()
import fastrnn
print(time.perf_counter() - start)
print(*{name.partition(".")[0] for name in set(sys.modules) - before})
"""


def run(*command, cwd, **env):
    """Standard output of `command`; its standard error is in the failure's message."""
    inherited = {name: value for name, value in os.environ.items() if name not in CLEARED}
    # test_cuda_build.py has them compiled
    inherited["FASTRNN_BUILD_CUDA"] = "0"
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=inherited | env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copy_tree(target):
    """The files on disk, committed or not, without environments, caches and earlier builds."""

    def unwanted(folder, names):
        return [
            name
            for name in names
            if name in (".git", "__pycache__", "build", "dist")
            or name.endswith((".egg-info", "_cache", ".so"))
            or Path(folder, name, "pyvenv.cfg").exists()
        ]

    return Path(shutil.copytree(ROOT, target, symlinks=True, ignore=unwanted))


def clean_environment(folder):
    """The interpreter of a new environment that sees torch and its like, but no fastrnn.

    A .pth file inside the folders that it adds is not followed, so an editable install stays out of sight.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site_packages = Path(run(python, "-c", ASK_SITE_PACKAGES, cwd=folder).strip())
    libraries = {Path(library.__file__).parents[1] for library in (torch, numpy, numba)}
    (site_packages / "libraries.pth").write_text("\n".join(map(str, sorted(libraries))))
    fastrnn_there = "import importlib.util as util; print(util.find_spec('fastrnn'))"
    assert run(python, "-c", fastrnn_there, cwd=folder) == "None\n"
    return python


def install(python, *requirement, cwd):
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"),
        *("--no-build-isolation", *requirement),
        cwd=cwd,
    )


def build(tree, *formats):
    """The folder of what `python -m build` made: without downloads, and where torch cannot be imported."""
    no_torch = tree.parent / "no_torch"
    no_torch.mkdir()
    (no_torch / "torch.py").write_text("raise ImportError('the build must not need torch')")
    run(sys.executable, "-m", "build", "--no-isolation", *formats, tree, cwd=tree, PYTHONPATH=str(no_torch))
    return tree / "dist"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    dist = build(copy_tree(tmp_path_factory.mktemp("wheel") / "tree"), "--wheel")
    return next(dist.glob("fastrnn-*.whl"))


@pytest.fixture(scope="module")
def sdist_and_its_wheel(tmp_path_factory):
    dist = build(copy_tree(tmp_path_factory.mktemp("sdist") / "tree"))
    return next(dist.glob("fastrnn-*.tar.gz")), next(dist.glob("fastrnn-*.whl"))


def package_files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if name.startswith("fastrnn/")}


def test_a_wheel_holds_the_package_and_nothing_else(wheel):
    expected = {f"fastrnn/{path.name}" for path in (ROOT / "fastrnn").glob("*.py")} | {"fastrnn/py.typed"}
    expected |= {f"fastrnn/kernels/{path.name}" for path in (ROOT / "fastrnn" / "kernels").glob("*.py")}
    assert set(package_files(wheel)) == expected
    assert any(name.startswith("fastrnn/kernels/") for name in expected)
    assert wheel.name == f"fastrnn-{fastrnn.__version__}-py3-none-any.whl"


def test_an_sdist_gives_the_same_wheel_and_holds_its_tests(wheel, sdist_and_its_wheel):
    sdist, its_wheel = sdist_and_its_wheel
    assert package_files(its_wheel) == package_files(wheel)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "Makefile", "csrc/scan.cuh", "setup.py", f"tests/{Path(__file__).name}"} <= names


@pytest.mark.parametrize("source", ["checkout", "editable", "wheel", "wheel from the sdist"])
def test_trains_like_torch_in_a_clean_environment(source, tmp_path, request):
    python = clean_environment(tmp_path / "environment")
    origin, cwd = tmp_path / "environment", tmp_path
    match source:
        case "checkout":
            origin = cwd = copy_tree(tmp_path / "tree")
        case "editable":
            origin = copy_tree(tmp_path / "tree")
            install(python, "--editable", origin, cwd=tmp_path)
        case "wheel":
            install(python, request.getfixturevalue("wheel"), cwd=tmp_path)
        case "wheel from the sdist":
            install(python, request.getfixturevalue("sdist_and_its_wheel")[1], cwd=tmp_path)
    # By name, so that a package that lacks its kernels cannot pass through torch's.
    version = run(python, "-c", TRAINS_LIKE_TORCH, origin, cwd=cwd, FASTRNN_BACKEND="numba").strip()
    assert version == fastrnn.__version__


def test_build_ext_inplace_succeeds(tmp_path):
    run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=copy_tree(tmp_path / "tree"))


def test_importing_is_quick_and_takes_neither_numba_nor_triton():
    seconds = []
    for _ in range(3):
        took, modules = run(sys.executable, "-c", IMPORT_COST, cwd=ROOT).splitlines()
        assert not {"numba", "llvmlite", "triton"} & set(modules.split())
        seconds.append(float(took))
    assert min(seconds) < 0.05, f"import fastrnn adds {min(seconds) * 1000:.0f} ms to import torch"
