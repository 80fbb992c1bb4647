"""What a build of csrc/ is of, and which GPUs it is for. setup.py reads this file too, so that it imports no torch."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

REBUILD = "python setup.py build_ext --inplace"


def fingerprint(csrc: Path) -> str:
    """A short digest of the sources' names and contents."""
    digest = hashlib.sha256()
    for path in sorted(path for path in csrc.iterdir() if path.suffix in (".cu", ".cuh", ".cpp", ".h")):
        content = path.read_bytes()
        # with the length, so that no text can move from one file to the next unnoticed
        digest.update(f"{path.name} {len(content)} ".encode() + content)
    return digest.hexdigest()[:16]


def why_outdated(built_of: str | None, root: Path) -> str | None:
    """Why a module that was built of sources with this fingerprint is not of those in ``root``, or None.

    An installed package has no sources beside it, and its module cannot be older than itself.
    """
    csrc = root / "csrc"
    # site-packages may have some other package's csrc
    if not (csrc / "scan.cuh").is_file() or built_of == fingerprint(csrc):
        return None
    return f"its kernels were built of other sources than those in {csrc}: rebuild with `{REBUILD}`"


def why_no_image(images: Sequence[str], ptx: str, capability: tuple[int, int]) -> str | None:
    """Why a module with these images ("80", "90a") and this PTX has no code for a device, or None if it has."""

    def number(arch):
        return int(arch.rstrip("af"))

    device = 10 * capability[0] + capability[1]
    for arch in images:
        # one with an "a" is for that GPU alone, others for later ones of the same major version too
        later = number(arch) // 10 == capability[0] and number(arch) <= device and not arch.endswith("a")
        if later or number(arch) == device:
            return None
    if number(ptx) == device or (number(ptx) < device and not ptx.endswith(("a", "f"))):
        return None
    built_for = ", ".join(f"sm_{arch}" for arch in images)
    return (
        f"its kernels were built for {built_for} and as PTX for compute_{ptx}, the GPU is sm_{device}: "
        f"rebuild with `FASTRNN_CUDA_ARCHS={device} {REBUILD}`"
    )
