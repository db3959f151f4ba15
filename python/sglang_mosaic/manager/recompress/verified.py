"""A record with a smaller body, once that has been seen to restore."""

from __future__ import annotations

import dataclasses

import numpy as np

from sglang_mosaic.manager.recompress.base import Packed
from sglang_mosaic.manager.recompress.groups import FrameError
from sglang_mosaic.manager.store.record import Form, Record
from sglang_mosaic.wire.slots import checksum


def smaller(record: Record, form: Form, packed: Packed, restored: np.ndarray) -> Record:
    """The record in another form; its checksum is that of the frame that it restores to.

    Args:
        packed: made of the record's frame.
        restored: what the packed bytes gave, uint8 [frame bytes].

    Raises:
        FrameError: not the frame that they should give.
    """
    if not np.array_equal(restored, packed.frame):
        raise FrameError("a packed page does not restore to what it said")
    frame = packed.frame.tobytes()
    return dataclasses.replace(
        record, form=form, body=packed.data, length=len(frame), checksum=checksum(record.key, frame)
    )
