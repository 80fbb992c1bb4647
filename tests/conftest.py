"""Triton's kernels run on CPU tensors here, in its interpreter: this must be said before anything imports Triton."""

import os

os.environ["TRITON_INTERPRET"] = "1"
