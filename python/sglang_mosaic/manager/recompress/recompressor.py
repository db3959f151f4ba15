"""Records of pages -> smaller records, and back to frames."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from sglang_mosaic.manager.recompress.base import FrameCodec
from sglang_mosaic.manager.recompress.cold_pages import ColdPages
from sglang_mosaic.manager.recompress.groups import FrameError, FrameLayout
from sglang_mosaic.manager.recompress.planes import PlanesPacking
from sglang_mosaic.manager.recompress.verified import smaller
from sglang_mosaic.manager.store.record import Form, Record
from sglang_mosaic.wire.slots import checksum

EPOCHS = 4
"""Epochs whose codecs are kept ready."""


class Recompressor:
    """Not for use from two threads at once, but for `restore`, which changes nothing that `compress` reads.

    Args:
        max_error: of FrameCodec.pack.
        epoch: finds the bytes of an epoch by its hash; None: nobody knows it.
        cold: what makes packed pages smaller still.
    """

    def __init__(self, max_error: float, epoch: Callable[[str], bytes | None], cold: ColdPages) -> None:
        self.cold = cold
        self._max_error = max_error
        self._epoch = epoch
        self._codecs: OrderedDict[str, FrameCodec] = OrderedDict()

    def ready(self, record: Record) -> bool:
        """Whether the record's epoch is known, if it has one.

        Raises:
            FrameError: the epoch is damaged.
        """
        return not record.meta.epoch or self._codec(record.meta.epoch) is not None

    def compress(self, record: Record) -> Record | None:
        """A smaller record, verified by restoring it; None: it has no epoch, or nothing is gained.

        Raises:
            FrameError: the record is no frame of its epoch.
        """
        codec = self._codec(record.meta.epoch)
        if codec is None or record.form is not Form.RAW:
            return None
        packed = codec.pack(np.frombuffer(record.body, np.uint8), self._max_error)
        if len(packed.data) >= len(record.body):
            return None
        return smaller(record, Form.PACKED, packed, codec.unpack(packed.data))

    def restore(self, record: Record) -> bytes | memoryview:
        """The record's own bytes, verified.

        Raises:
            FrameError: they cannot be had: the epoch is unknown, or something is damaged.
        """
        data = record.body
        if record.form is Form.TRANSFORMED:
            data = self.cold.restore(record)
        elif record.form is Form.PACKED:
            codec = self._codec(record.meta.epoch)
            if codec is None:
                raise FrameError(f"epoch {record.meta.epoch!r} is unknown")
            data = codec.unpack(bytes(data)).tobytes()
        if len(data) != record.length or checksum(record.key, data) != record.checksum:
            raise FrameError("a restored record does not match its checksum")
        return data

    def _codec(self, epoch: str) -> FrameCodec | None:
        codec = self._codecs.get(epoch)
        if codec is None and epoch and (data := self._epoch(epoch)) is not None:
            codec = self._codecs[epoch] = PlanesPacking(FrameLayout(data))
            while len(self._codecs) > EPOCHS:
                self._codecs.popitem(last=False)
        return codec
