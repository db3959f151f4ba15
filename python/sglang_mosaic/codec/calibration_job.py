"""A calibration as bytes in, bytes out: what another process needs to run it. safetensors, nothing is executed."""

from __future__ import annotations

import io
import json
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from sglang_mosaic.codec.base import LayerSample
from sglang_mosaic.codec.calibration import CalibrationInput, LayerStatistics
from sglang_mosaic.codec.planes import calibrate
from sglang_mosaic.codec.storage import epoch_to_bytes, metadata_of
from sglang_mosaic.errors import MosaicError

VERSION = 1
_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Of types in a file."""


class StatisticsError(MosaicError, ValueError):
    """Bytes that are no statistics, or that no calibration can be made of."""


def write_statistics(given: CalibrationInput, file: BinaryIO) -> None:
    """Write the statistics, tensor by tensor: they are hundreds of MB for a large model, and a server goes on beside.

    The format is that of safetensors (https://huggingface.co/docs/safetensors), whose library wants all in one piece.
    """
    tensors: dict[str, torch.Tensor] = {}
    for i, layer in enumerate(given.layers):
        known = {
            "energy": layer.query_energy,
            "queries": layer.queries,
            "keys": layer.sample.keys,
            "values": layer.sample.values,
        }
        tensors |= {f"{i}.{name}": x for name, x in known.items() if x is not None}
    plain = {
        "version": VERSION,
        "frame_bytes": given.frame_bytes,
        "scale": given.scale,
        "page_size": given.page_size,
        "sinks": [layer.sample.sinks for layer in given.layers],
    }
    header: dict[str, object] = {"__metadata__": {"statistics": json.dumps(plain)}}
    end = 0
    for name, x in tensors.items():
        header[name] = {"dtype": _NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [end, end + x.nbytes]}
        end += x.nbytes
    text = json.dumps(header).encode()
    file.write(len(text).to_bytes(8, "little") + text)
    for x in tensors.values():
        file.write(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def statistics_to_bytes(given: CalibrationInput) -> bytes:
    """The statistics, copied to the host."""
    file = io.BytesIO()
    write_statistics(given, file)
    return file.getvalue()


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


def run(statistics: bytes, workers: int = 1) -> bytes:
    """Bytes of the epoch (storage.epoch_from_bytes) of some statistics; `workers` as of `make_plan`.

    Raises:
        StatisticsError: it cannot be made.
    """
    given = statistics_from_bytes(statistics)
    try:
        return epoch_to_bytes(calibrate(given, workers=workers))
    except (ValueError, RuntimeError, IndexError) as error:
        raise StatisticsError(f"no calibration can be made of these statistics: {error}") from error
