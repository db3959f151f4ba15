"""A page as the host keeps it."""

from __future__ import annotations

from typing import NamedTuple

from mosaic_kernels.segment import REVISION
from sglang_mosaic.wire.messages import Meta, RecordKind


class HostPage(NamedTuple):
    """Bytes of one page, all layers and KV heads of this rank."""

    epoch: str
    """Hash of the calibration of a mosaic frame; empty: a dense frame, K and V of one layer after the other."""
    data: bytes | memoryview
    position: int = -1
    """Of its first token in its sequence; -1: unknown."""


class Label(NamedTuple):
    """What is known of a page whose bytes are still under way."""

    key: bytes
    """Of its record."""
    epoch: str
    """As of HostPage."""
    position: int


def meta_of(page: HostPage) -> Meta:
    """What the manager is told about a page."""
    return Meta(RecordKind.PAGE, REVISION, page.epoch, page.position)


def page_of(meta: Meta, data: bytes | memoryview) -> HostPage | None:
    """A page of a record; None: its byte format is another one."""
    return HostPage(meta.epoch, data, meta.position) if meta.revision == REVISION else None
