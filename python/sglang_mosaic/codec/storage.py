"""Epochs as files or bytes: safetensors with the bases, and the plan as JSON in its metadata. Nothing in it is
executed."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file

from mosaic_kernels.segment import SegmentFormat
from mosaic_kernels.topk.segment import TopKFormat
from sglang_mosaic.codec.basis import LayerBasis
from sglang_mosaic.codec.plan import Format, HeadPlan, LayerPlan
from sglang_mosaic.codec.planes import PlanesEpoch
from sglang_mosaic.codec.selection import SelectionProfile
from sglang_mosaic.errors import ConfigError

VERSION = "3"
_FORMATS = {"planes": SegmentFormat, "topk": TopKFormat}


def save_epoch(epoch: PlanesEpoch, path: Path) -> None:
    """Write an epoch; the file appears complete or not at all.

    Raises:
        OSError: it cannot be written.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        tensors, metadata = _contents(epoch)
        save_file(tensors, partial, metadata)
        os.replace(partial, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        partial.unlink(missing_ok=True)


def load_epoch(path: Path, device: torch.device | str = "cpu") -> PlanesEpoch:
    """Read an epoch.

    Raises:
        ConfigError: the file is missing, damaged or of another version.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return _epoch(str(path), file.metadata() or {}, file.get_tensor)
    except (OSError, SafetensorError) as error:
        raise _no_calibration(str(path), error) from error


def epoch_to_bytes(epoch: PlanesEpoch) -> bytes:
    """What `save_epoch` writes."""
    tensors, metadata = _contents(epoch)
    return save(tensors, metadata)


def epoch_from_bytes(data: bytes, device: torch.device | str = "cpu") -> PlanesEpoch:
    """The inverse of `epoch_to_bytes`.

    Raises:
        ConfigError: the bytes are damaged or of another version.
    """
    try:
        tensors, metadata = load(data), metadata_of(data)
    except (SafetensorError, ValueError) as error:
        raise _no_calibration("bytes of an epoch", error) from error
    return _epoch("bytes of an epoch", metadata, lambda name: tensors[name].to(device))


def metadata_of(data: bytes) -> dict[str, str]:
    """Metadata of a safetensors file.

    Raises:
        ValueError: it is none.
    """
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]).get("__metadata__") or {}


def _contents(epoch: PlanesEpoch) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    tensors = {
        f"{layer}.{name}": matrix.detach().cpu().contiguous()
        for layer, plan in enumerate(epoch.layers)
        for name, matrix in plan.basis._asdict().items()
    }
    heads = [[_head_to_json(head) for head in plan.heads] for plan in epoch.layers]
    metadata = {"version": VERSION, "hash": epoch.hash, "page_size": str(epoch.page_size), "heads": json.dumps(heads)}
    return tensors, metadata


def _epoch(source: str, metadata: dict[str, str], tensor: Callable[[str], torch.Tensor]) -> PlanesEpoch:
    _check_version(source, metadata)
    try:
        layers = []
        for layer, heads in enumerate(json.loads(metadata["heads"])):
            basis = LayerBasis(*(tensor(f"{layer}.{name}") for name in LayerBasis._fields))
            layers.append(LayerPlan(basis, tuple(_head_from_json(head) for head in heads)))
        epoch = PlanesEpoch(layers, int(metadata["page_size"]))
        intact = epoch.hash == metadata["hash"]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise _no_calibration(source, error) from error
    if not intact:
        raise ConfigError(f"{source}: its contents do not match its hash; write it again with sglang-mosaic calibrate.")
    return epoch


def _no_calibration(source: str, error: Exception) -> ConfigError:
    return ConfigError(f"{source}: not a calibration ({error}); write one with sglang-mosaic calibrate.")


def _check_version(source: str, metadata: dict[str, str]) -> None:
    found = metadata.get("version")
    if found != VERSION:
        raise ConfigError(
            f"{source}: found version {found} of a calibration, expected {VERSION}; write it again with "
            "sglang-mosaic calibrate."
        )


def _head_to_json(head: HeadPlan) -> dict[str, Any]:
    formats = [
        {"strategy": next(name for name, kind in _FORMATS.items() if isinstance(fmt, kind)), **dataclasses.asdict(fmt)}
        for fmt in head.formats
    ]
    return {**head._asdict(), "formats": formats, "selection": head.selection._asdict()}


def _head_from_json(head: dict[str, Any]) -> HeadPlan:
    formats = tuple(_format(**fmt) for fmt in head["formats"])
    return HeadPlan(**{**head, "formats": formats, "selection": SelectionProfile(**head["selection"])})


def _format(strategy: str, **fields: Any) -> Format:
    return _FORMATS[strategy](**{name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()})
