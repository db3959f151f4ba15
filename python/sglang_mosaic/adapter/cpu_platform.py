"""An SGLang platform for a plain CPU: no sgl-kernel, no AMX, no GPU. Active only when there is no accelerator.

SGLang's own CPU engine needs its compiled kernels. This platform makes it run on torch alone, for stock attention
(``torch_native``) as for ours, which is what development, CI and the comparisons of this project need.
"""

from __future__ import annotations

import os

import torch


def activate() -> str | None:
    """Entry point of the group ``sglang.srt.platforms``: the platform's class path, or None where an accelerator is."""
    # SGLANG_USE_CPU_ENGINE=1 asks for SGLang's own CPU engine.
    if torch.cuda.is_available() or torch.xpu.is_available() or os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return None
    return "sglang_mosaic.adapter.cpu_platform_class.PlainCpuPlatform"


def is_active() -> bool:
    """Whether SGLang runs on this platform, in this process."""
    from sglang.srt.platforms import current_platform

    return type(current_platform).__name__ == "PlainCpuPlatform"
