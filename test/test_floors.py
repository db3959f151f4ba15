"""Imports point down only: each floor may import its own package and the floors below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ROOT / "python" / "sglang_mosaic"

FLOORS = {
    "errors": 0, "page": 0, "layout": 0, "config": 0, "torchvision_compat": 0,
    "pool": 1, "codec": 1, "wire": 1,
    "manager": 2,
    "cache": 3,
    "adapter": 4,
    "launch_server": 5, "cli": 5, "calibrate": 5, "doctor": 5, "embedded_model": 5,
}  # fmt: skip
PEERS = {"pool", "codec", "wire"}


def part_of(path: Path) -> str:
    return path.relative_to(PRODUCT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def product_files() -> list[Path]:
    return sorted(path for path in PRODUCT.rglob("*.py") if path != PRODUCT / "__init__.py")


@pytest.mark.parametrize("path", product_files(), ids=lambda path: str(path.relative_to(PRODUCT)))
def test_imports_point_down(path: Path) -> None:
    own = part_of(path)
    assert own in FLOORS, f"{own} has no floor: add it to FLOORS and to docs/architecture.md"
    for name in imports(path):
        package, _, rest = name.partition(".")
        if package == "sglang":
            assert FLOORS[own] >= 4, f"{path} imports {name}: only the adapter and what lies above it knows SGLang"
        if package == "sglang_mosaic" and rest and (part := rest.split(".")[0]) in FLOORS:
            assert FLOORS[part] <= FLOORS[own], f"{path} imports {name} from a higher floor"
            assert part == own or not {part, own} <= PEERS, f"{path} imports its peer {name}"


def test_kernels_import_nothing_of_ours() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        foreign = {name.partition(".")[0] for name in imports(path)} & {"sglang", "sglang_mosaic"}
        assert not foreign, f"{path} imports {foreign}"


def test_kernels_root_is_no_package() -> None:
    # SGLang and transformers import a third-party package called "kernels".
    assert not (ROOT / "kernels" / "__init__.py").exists()
