"""Lets torchvision be imported beside a torch that its compiled extension was not built for.

The torchvision on the package index is a CUDA build. Beside a CPU build of torch its extension cannot be loaded (its
CUDA libraries are missing), which torchvision survives by itself; but its `_meta_registrations.py` then registers
shape functions for `torchvision::nms` and `torchvision::qnms`, whose schemas only the extension declares, and the whole
import fails. SGLang and transformers import torchvision without a guard, so both fail with it. Declaring the two
schemas is enough: nothing here ever calls the operators, and one that did would get torch's "no kernel" error.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from pathlib import Path

# As declared by torchvision's extension (torchvision/csrc/ops/nms.cpp and quantized/cpu/qnms_kernel.cpp).
_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}

# torch drops a library's declarations when the object dies: it must live as long as the process.
_library = None


def declare_missing_operators() -> list[str]:
    """Declare the operators that `import torchvision` needs and its extension cannot provide.

    Call it before anything imports torchvision. Does nothing where torchvision is not installed, is imported already,
    or has an extension that loads; a second call does nothing.

    Returns:
        Names of the operators declared by this call, empty when none was needed.
    """
    global _library
    if _library is not None or "torchvision" in sys.modules:
        return []
    spec = PathFinder.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return []

    import torch

    if _load_extension(Path(spec.submodule_search_locations[0])):
        return []
    missing = [name for name in _SCHEMAS if not hasattr(torch.ops.torchvision, name)]
    if missing:
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for name in missing:
            _library.define(name + _SCHEMAS[name])
    return missing


class _DeclareBeforeImport:
    """Meta-path entry that declares the operators at the first import of torchvision, wherever it comes from."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            declare_missing_operators()


def declare_on_import() -> None:
    """Declare the operators as soon as anything imports torchvision.

    For the start-up line of a CPU environment (a ``.pth`` file, see scripts/install_cpu.sh): ``python -m
    sglang.launch_server`` and SGLang's spawned processes import torchvision before any plugin is loaded. Costs nothing
    in a process that never does.
    """
    sys.meta_path.insert(0, _DeclareBeforeImport())


def declares_on_import() -> bool:
    """Whether ``declare_on_import`` is waiting for the first import of torchvision in this process."""
    return any(isinstance(finder, _DeclareBeforeImport) for finder in sys.meta_path)


def _load_extension(package_dir: Path) -> bool:
    """Whether torchvision's own extension loads; torchvision does the same on import, and loading twice is harmless."""
    import torch

    for path in sorted([*package_dir.glob("_C*.so"), *package_dir.glob("_C*.pyd")]):
        try:
            torch.ops.load_library(str(path))
        except OSError:
            continue
        return True
    return False
