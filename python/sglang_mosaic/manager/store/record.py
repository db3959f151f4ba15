"""A record: one page or epoch as the store keeps it, and as it lies in a file."""

from __future__ import annotations

import dataclasses
import enum
import struct

import xxhash

from sglang_mosaic.errors import MosaicError
from sglang_mosaic.wire.messages import KEY_BYTES, Meta, RecordKind

MAGIC = b"SGLMOSAI"
VERSION = 2
EPOCH_BYTES = 32
"""Room for the hash of an epoch."""
_HEADER = struct.Struct(f"<8sHBBI{KEY_BYTES}s{EPOCH_BYTES}sqQQQQ")
_CHECKSUM = struct.Struct("<Q")
HEADER_BYTES = _HEADER.size + _CHECKSUM.size

RecordId = tuple[RecordKind, bytes]
"""Kind and key."""


class CorruptRecord(MosaicError):
    """Bytes that are no record, not the one that was asked for, or not whole. A miss, never an answer."""


class Form(enum.IntEnum):
    """How the body is to be read."""

    RAW = 0
    """The record's own bytes."""
    PACKED = 1
    """Entropy-coded (recompress/)."""
    TRANSFORMED = 2
    """Transform-coded (recompress/cold.py)."""


@dataclasses.dataclass(frozen=True)
class Record:
    """Bytes with everything that is needed to give them back."""

    key: bytes
    meta: Meta
    form: Form
    length: int
    """Bytes that restoring gives."""
    checksum: int
    """Of these, as the wire has it (slots.checksum)."""
    body: bytes | memoryview

    @property
    def id(self) -> RecordId:
        return self.meta.kind, self.key

    @property
    def nbytes(self) -> int:
        """Bytes that count against a tier's limit: those of its file."""
        return HEADER_BYTES + len(self.body)

    def to_bytes(self) -> bytes:
        """The file."""
        meta = self.meta
        header = _HEADER.pack(
            MAGIC,
            VERSION,
            meta.kind,
            self.form,
            meta.revision,
            self.key,
            meta.epoch.encode("ascii"),
            meta.position,
            self.length,
            self.checksum,
            len(self.body),
            xxhash.xxh3_64_intdigest(self.body),
        )
        return b"".join((header, _CHECKSUM.pack(xxhash.xxh3_64_intdigest(header)), self.body))

    @classmethod
    def from_bytes(cls, data: bytes, wanted: RecordId) -> Record:
        """The record of a file.

        Raises:
            CorruptRecord: naming what is wrong.
        """
        if len(data) < HEADER_BYTES:
            raise CorruptRecord(f"{len(data)} bytes are no record")
        header = data[: _HEADER.size]
        if _CHECKSUM.unpack_from(data, _HEADER.size)[0] != xxhash.xxh3_64_intdigest(header):
            raise CorruptRecord("the header does not match its checksum")
        magic, version, kind, form, revision, key, epoch, position, *sizes = _HEADER.unpack(header)
        length, checksum, body_length, body_checksum = sizes
        if (magic, version) != (MAGIC, VERSION):
            raise CorruptRecord(f"a record of another program or version: {magic!r} {version}")
        if (kind, key) != wanted:
            raise CorruptRecord("the record of another key")
        body = data[HEADER_BYTES:]
        if len(body) != body_length or xxhash.xxh3_64_intdigest(body) != body_checksum:
            raise CorruptRecord("the body does not match its checksum")
        try:
            meta = Meta(RecordKind(kind), revision, epoch.rstrip(b"\0").decode("ascii"), position)
            return cls(key, meta, Form(form), length, checksum, body)
        except ValueError as error:
            raise CorruptRecord(str(error)) from error
