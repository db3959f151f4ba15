"""Records of pages that stay cold: the transform of their epoch, learnt from its first pages, and what it codes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from sglang_mosaic.manager.recompress.cold import FrameRows, TransformCoding
from sglang_mosaic.manager.recompress.groups import FrameError
from sglang_mosaic.manager.recompress.rope import Rope
from sglang_mosaic.manager.recompress.transform import Transform, calibrate
from sglang_mosaic.manager.recompress.verified import smaller
from sglang_mosaic.manager.store.record import Form, Record
from sglang_mosaic.wire.messages import RecordKind

SAMPLE = 64
"""Pages that a transform is learnt from: 4,096 tokens for components over at most 1,024 channels."""
EPOCHS = 4
"""Epochs whose codecs, and whose samples, are kept."""

Find = Callable[[str], bytes | None]
_T = TypeVar("_T")


class ColdPages:
    """One transform for each epoch: the first that is found in the store, or else made here. A page names the one that
    it was coded with; should two managers that share a directory have made one at the same time, the pages of the one
    that lost are misses.

    Args:
        max_error: of TransformCoding.pack; 0: nothing is coded, but what is there is read.
        rope: of the model.
        epoch, transform: find bytes by the hash of an epoch; None: nobody knows them.
    """

    def __init__(self, max_error: float, rope: Rope, epoch: Find, transform: Find) -> None:
        self._max_error = max_error
        self._rope = rope
        self._epoch = epoch
        self._transform = transform
        self._codecs: OrderedDict[str, TransformCoding] = OrderedDict()
        self._known: OrderedDict[str, FrameRows] = OrderedDict()
        self._samples: OrderedDict[str, list[tuple[np.ndarray, int]]] = OrderedDict()

    def learn(self, record: Record) -> bytes | None:
        """See a page as it came from the server. Most calls copy it at most; one may take minutes.

        Returns:
            The epoch's transform, when this page completes the sample.
        """
        epoch = record.meta.epoch
        if not self.codes or not self._can_place(record) or self._codec(epoch) is not None:
            return None
        planes = self._planes(epoch)
        page = np.frombuffer(record.body, np.uint8), record.meta.position
        if planes is None or not _usable(planes, *page):
            return None
        if epoch not in self._samples:
            _keep(self._samples, epoch, [])
        sample = self._samples[epoch]
        sample.append(page)
        if len(sample) < SAMPLE:
            return None
        del self._samples[epoch]
        made = calibrate(lambda: (planes.rows(*page) for page in sample)).to_bytes()
        # Another manager may have been faster.
        return made if self._transform(epoch) is None else None

    @property
    def codes(self) -> bool:
        """Whether any page is coded here."""
        return bool(self._max_error)

    def can_code(self, record: Record) -> bool:
        """Whether the record is a page whose transform is known."""
        return self.codes and self._can_place(record) and self._codec(record.meta.epoch) is not None

    def compress(self, record: Record, frame: bytes | memoryview) -> Record | None:
        """A smaller record, verified by restoring it; None: the limit allows none.

        Args:
            frame: what the record restores to.

        Raises:
            FrameError: the record is no frame of its epoch.
        """
        codec = self._codec(record.meta.epoch)
        if codec is None:
            return None
        packed = codec.pack(np.frombuffer(frame, np.uint8), record.meta.position, self._max_error)
        if packed is None or len(packed.data) >= len(record.body):
            return None
        return smaller(record, Form.TRANSFORMED, packed, codec.unpack(packed.data, record.meta.position))

    def restore(self, record: Record) -> bytes:
        """The frame that the record was verified with, unless this is another kind of machine.

        Raises:
            FrameError: it cannot be had.
        """
        codec = self._codec(record.meta.epoch)
        if codec is None:
            raise FrameError(f"the transform of epoch {record.meta.epoch!r} is unknown")
        return codec.unpack(bytes(record.body), record.meta.position).tobytes()

    def _can_place(self, record: Record) -> bool:
        known = record.meta.position >= 0 or not self._rope.channels
        return record.meta.kind is RecordKind.PAGE and bool(record.meta.epoch) and known

    def _codec(self, epoch: str) -> TransformCoding | None:
        codec = self._codecs.get(epoch)
        if codec is None and (data := self._transform(epoch)) is not None and (planes := self._planes(epoch)):
            try:
                codec = TransformCoding(planes, Transform.from_bytes(data))
            except FrameError:
                return None
            _keep(self._codecs, epoch, codec)
        return codec

    def _planes(self, epoch: str) -> FrameRows | None:
        planes = self._known.get(epoch)
        if planes is None and (data := self._epoch(epoch)) is not None:
            try:
                planes = FrameRows.of(data, self._rope)
            except FrameError:
                return None
            _keep(self._known, epoch, planes)
        return planes


def _keep(kept: OrderedDict[str, _T], epoch: str, thing: _T) -> None:
    kept[epoch] = thing
    while len(kept) > EPOCHS:
        kept.popitem(last=False)


def _usable(planes: FrameRows, frame: np.ndarray, position: int) -> bool:
    """Whether a page can be learnt from: of bit planes alone, and finite."""
    try:
        return all(np.isfinite(x).all() for x in planes.rows(frame, position))
    except FrameError:
        return False
