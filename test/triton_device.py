"""Where the tests of Triton kernels run: on the GPU, or, without one, by Triton's interpreter on the CPU.

conftest.py imports this before anything that imports Triton, which decides when it sees a kernel's definition, its own
functions included. The variable is not left behind, so that servers which other tests start do not see it.
"""

import importlib
import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"

OPS = (
    "attend_dense", "attend_pages", "attend_selected", "combine", "far_field", "far_share", "merge_lse", "plan_step",
    "query_squares", "rotate_pages", "rotate_queries", "rotate_rows", "scan", "segment_choice", "segment_decode",
    "segment_encode", "segment_error", "select",
)  # fmt: skip

if INTERPRETED:
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    # Gluon is imported when a kernel is first called.
    for name in ("triton.experimental.gluon", *(f"mosaic_kernels.{op}.launch" for op in OPS)):
        importlib.import_module(name)
    del os.environ["TRITON_INTERPRET"]
    importlib.import_module("fast_interpreter").make_fast()
    # Tensors of tests are small: a second thread makes them slower, by as much as three times beside other processes.
    torch.set_num_threads(1)
    if before is not None:
        os.environ["TRITON_INTERPRET"] = before
