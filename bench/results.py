"""The results: one append-only CSV, a row for each measurement, with all that is needed to read it later."""

import csv
import datetime
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fastrnn

from .timer import Timing
from .workloads import Workload


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Where and when a result was measured; empty where it does not apply."""

    date: str
    commit: str
    device: str
    driver: str
    cuda: str
    cudnn: str
    python: str
    torch: str
    fastrnn: str
    numba: str
    triton: str


@dataclass(frozen=True, kw_only=True)
class Result(Environment):
    """One row of the CSV. Times are milliseconds a call; `ratio` is torch's median over ours, above 1 is faster.

    p20 and p80 are percentiles over the samples, first_call_ms holds what that call compiles or loads.
    """

    workload: str
    cell: str
    mode: str
    input: int
    hidden: int
    layers: int
    bidirectional: bool
    batch: int
    time: int
    padding: float
    dtype: str
    threads: int
    backend: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    samples: int
    torch_module: str
    torch_median_ms: float
    torch_p20_ms: float
    torch_p80_ms: float
    ratio: float
    floor_ms: float
    floor_share: float
    first_call_ms: float
    note: str


COLUMNS = [field.name for field in fields(Result)]


def row(
    workload: Workload,
    device: torch.device,
    dtype: str,
    threads: int,
    *,
    backend: str,
    first_call: float,
    ours: Timing,
    torch_module: str,
    theirs: Timing,
    floor: float,
    notes: Iterable[str],
) -> Result:
    """What was measured of one workload, as a row: `first_call` and `floor` in seconds, empty notes are left out."""
    noisy = "noisy" if ours.noisy or theirs.noisy else ""
    return Result(
        **asdict(environment(device)),
        workload=workload.name,
        cell=workload.cell,
        mode=workload.mode,
        input=workload.input,
        hidden=workload.hidden,
        layers=workload.layers,
        bidirectional=workload.bidirectional,
        batch=workload.batch,
        time=workload.time,
        padding=workload.variable,
        dtype=dtype,
        threads=threads,
        backend=backend,
        median_ms=1e3 * ours.median,
        p20_ms=1e3 * ours.p20,
        p80_ms=1e3 * ours.p80,
        samples=ours.samples,
        torch_module=torch_module,
        torch_median_ms=1e3 * theirs.median,
        torch_p20_ms=1e3 * theirs.p20,
        torch_p80_ms=1e3 * theirs.p80,
        ratio=theirs.median / ours.median,
        floor_ms=1e3 * floor,
        floor_share=floor / ours.median,
        first_call_ms=1e3 * first_call,
        note="; ".join(filter(None, [*notes, noisy])),
    )


def append(path: Path, results: Iterable[Result]) -> None:
    """Adds rows to the CSV, which is begun where it does not exist.

    Raises ValueError if the file's columns are others: it is never rewritten.
    """
    check_columns(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        for result in results:
            writer.writerow(as_text(result))


def check_columns(path: Path) -> None:
    """Raises ValueError if `path` is a table of other columns, before an hour of measuring ends in it."""
    if not path.exists() or not path.stat().st_size:
        return
    with path.open(newline="", encoding="utf-8") as file:
        found = next(csv.reader(file))
    if found != COLUMNS:
        differing = ", ".join(sorted(set(found) ^ set(COLUMNS))) or "their order"
        raise ValueError(f"{path} has other columns ({differing}): name another file with --output")


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV, oldest first."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def as_text(result: Result) -> dict[str, str]:
    """A row as it stands in the CSV: six significant digits."""
    return {name: f"{value:.6g}" if isinstance(value, float) else str(value) for name, value in asdict(result).items()}


@cache
def environment(device: torch.device) -> Environment:
    """The versions and the machine of this process."""
    on_gpu = device.type == "cuda"
    return Environment(
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        commit=commit(),
        device=torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        driver=output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else "",
        cuda=(torch.version.cuda or "") if on_gpu else "",
        cudnn=str(torch.backends.cudnn.version() or "") if on_gpu else "",
        python=platform.python_version(),
        torch=torch.__version__,
        fastrnn=fastrnn.__version__,
        numba=version_of("numba"),
        triton=version_of("triton"),
    )


def commit() -> str:
    """The commit of the working tree, with a + where it has changes; "unknown" outside a repository."""
    folder = str(Path(__file__).parent)
    name = output_of("git", "-C", folder, "rev-parse", "--short", "HEAD")
    if not name:
        return "unknown"
    return name + ("+" if output_of("git", "-C", folder, "status", "--porcelain", "--untracked-files=no") else "")


def cpu_name() -> str:
    """The processor's name as Linux knows it, elsewhere its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def output_of(*command: Sequence[str]) -> str:
    """The first line of what a command prints; empty if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.partition("\n")[0].strip()
