"""Epochs as files: safetensors with the bases, and the plan as JSON in its metadata. Nothing in it is executed."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

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
    tensors = {
        f"{layer}.{name}": matrix.detach().cpu().contiguous()
        for layer, plan in enumerate(epoch.layers)
        for name, matrix in plan.basis._asdict().items()
    }
    heads = [[_head_to_json(head) for head in plan.heads] for plan in epoch.layers]
    metadata = {"version": VERSION, "hash": epoch.hash, "page_size": str(epoch.page_size), "heads": json.dumps(heads)}
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
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
            metadata = file.metadata() or {}
            _check_version(path, metadata)
            layers = []
            for layer, heads in enumerate(json.loads(metadata["heads"])):
                basis = LayerBasis(*(file.get_tensor(f"{layer}.{name}") for name in LayerBasis._fields))
                layers.append(LayerPlan(basis, tuple(_head_from_json(head) for head in heads)))
        epoch = PlanesEpoch(layers, int(metadata["page_size"]))
        intact = epoch.hash == metadata["hash"]
    except ConfigError:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: not a calibration ({error}); write one with sglang-mosaic calibrate.") from error
    if not intact:
        raise ConfigError(f"{path}: its contents do not match its hash; write it again with sglang-mosaic calibrate.")
    return epoch


def _check_version(path: Path, metadata: dict[str, str]) -> None:
    found = metadata.get("version")
    if found != VERSION:
        raise ConfigError(
            f"{path}: found version {found} of a calibration, expected {VERSION}; write it again with "
            "sglang-mosaic calibrate."
        )


def _head_to_json(head: HeadPlan) -> dict:
    formats = [
        {"strategy": next(name for name, kind in _FORMATS.items() if isinstance(fmt, kind)), **dataclasses.asdict(fmt)}
        for fmt in head.formats
    ]
    return {**head._asdict(), "formats": formats, "selection": head.selection._asdict()}


def _head_from_json(head: dict) -> HeadPlan:
    formats = tuple(_format(**fmt) for fmt in head["formats"])
    return HeadPlan(**{**head, "formats": formats, "selection": SelectionProfile(**head["selection"])})


def _format(strategy: str, **fields) -> Format:
    return _FORMATS[strategy](**{name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()})
