"""A calibration as bytes in, bytes out: what another process needs to run it. safetensors, nothing is executed."""

from __future__ import annotations

import json

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from sglang_mosaic.codec.base import LayerSample
from sglang_mosaic.codec.calibration import CalibrationInput, LayerStatistics
from sglang_mosaic.codec.planes import calibrate
from sglang_mosaic.codec.storage import epoch_to_bytes, metadata_of
from sglang_mosaic.errors import MosaicError

VERSION = 1


class StatisticsError(MosaicError, ValueError):
    """Bytes that are no statistics, or that no calibration can be made of."""


def statistics_to_bytes(given: CalibrationInput) -> bytes:
    """The statistics, copied to the host."""
    tensors: dict[str, torch.Tensor] = {}
    for i, layer in enumerate(given.layers):
        known = {
            "energy": layer.query_energy,
            "queries": layer.queries,
            "keys": layer.sample.keys,
            "values": layer.sample.values,
        }
        tensors |= {f"{i}.{name}": x.detach().cpu().contiguous() for name, x in known.items() if x is not None}
    plain = {
        "version": VERSION,
        "frame_bytes": given.frame_bytes,
        "scale": given.scale,
        "page_size": given.page_size,
        "sinks": [layer.sample.sinks for layer in given.layers],
    }
    return save(tensors, {"statistics": json.dumps(plain)})


def statistics_from_bytes(data: bytes) -> CalibrationInput:
    """The inverse of `statistics_to_bytes`.

    Raises:
        StatisticsError: the bytes are something else.
    """
    try:
        tensors, plain = load(data), json.loads(metadata_of(data)["statistics"])
        if plain["version"] != VERSION:
            raise StatisticsError(f"statistics of version {plain['version']}, expected {VERSION}")
        layers = [
            LayerStatistics(
                tensors.get(f"{i}.energy"),
                tensors.get(f"{i}.queries"),
                LayerSample(tensors[f"{i}.keys"], tensors[f"{i}.values"], int(sinks)),
            )
            for i, sinks in enumerate(plain["sinks"])
        ]
        return CalibrationInput(layers, int(plain["frame_bytes"]), float(plain["scale"]), int(plain["page_size"]))
    except StatisticsError:
        raise
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise StatisticsError(f"not the statistics of a calibration: {error}") from error


def run(statistics: bytes) -> bytes:
    """Bytes of the epoch (storage.epoch_from_bytes) of some statistics.

    Raises:
        StatisticsError: it cannot be made.
    """
    given = statistics_from_bytes(statistics)
    try:
        return epoch_to_bytes(calibrate(given))
    except (ValueError, RuntimeError, IndexError) as error:
        raise StatisticsError(f"no calibration can be made of these statistics: {error}") from error
