"""Messages between a server (the owner of the slots) and its manager, as msgpack, tagged by name.

Append-only: a new field has a default and stands last, so that a peer which does not know it still understands the
rest. `PROTOCOL` changes when that is not enough; a message of another protocol is refused. Payloads never travel here
but in slots (slots.py). Times are seconds of CLOCK_MONOTONIC, which the processes of one machine share.
"""

from __future__ import annotations

import enum
from typing import TypeVar

import msgspec

from sglang_mosaic.errors import MosaicError

PROTOCOL = 1
KEY_BYTES = 16
"""Bytes of a record's key."""
MOST_BYTES = 1 << 16
"""Longest message; longer ones are refused before anything in them is looked at."""
KEYS_PER_MESSAGE = 2048
"""Most keys in one list of keys."""


class WireError(MosaicError):
    """Bytes or shared memory that do not hold what they should. Refuse it, count it, go on."""


class RecordKind(enum.IntEnum):
    """What a record holds."""

    PAGE = 0
    """One mosaic frame of all layers and heads of a rank."""
    EPOCH = 1
    """What frames are decoded with: bases and formats, as codec/storage.py writes them."""
    STATISTICS = 2
    """What a calibration sees. Lives until its calibration is done, in no tier."""
    TRANSFORM = 3
    """What cold pages of an epoch are decoded with. The manager's own: it comes from no server and goes to none."""


class Meta(msgspec.Struct, frozen=True):
    """What is known about a record besides its bytes."""

    kind: RecordKind
    revision: int = 0
    """Of the byte format of frames (mosaic_kernels.segment.REVISION)."""
    epoch: str = ""
    """Hash of the epoch that a page was written with."""
    position: int = -1
    """Of a page's first token in its sequence; -1: unknown."""


class Slot(msgspec.Struct, frozen=True):
    """A slot and the life of it that is meant; a slot that was given to somebody else since has another generation."""

    index: int
    generation: int


class Payload(msgspec.Struct, frozen=True):
    """Bytes that lie in a slot."""

    slot: Slot
    length: int
    checksum: int
    """Of key and bytes (slots.checksum): right bytes under a wrong key are refused too."""


class Message(msgspec.Struct, kw_only=True, frozen=True, tag_field="is"):
    """Base of all messages."""

    protocol: int = PROTOCOL


# Server -> manager. Tickets grow strictly; one that does not is a replay.


class Put(Message, frozen=True, tag="put"):
    """Keep a record, or one part of it. Answered by `Stored`, for every part."""

    ticket: int
    key: bytes
    meta: Meta
    payload: Payload
    total: int
    """Bytes of the whole record."""
    offset: int = 0
    """Where the part begins in the record. Parts come in order."""


class Fetch(Message, frozen=True, tag="fetch"):
    """Bring one part of a record into a slot. Answered by `Fetched`."""

    ticket: int
    kind: RecordKind
    key: bytes
    slot: Slot
    deadline: float
    """After it nobody waits for the answer any more."""
    offset: int = 0


class Calibrate(Message, frozen=True, tag="calibrate"):
    """Make an epoch from statistics that were put before. Answered by `Calibrated`."""

    ticket: int
    key: bytes
    """Of the statistics."""


class Cancel(Message, frozen=True, tag="cancel"):
    """Nobody wants the answer to another ticket. Not answered."""

    ticket: int
    cancelled: int


class Ping(Message, frozen=True, tag="ping"):
    """Answered by `Pong`."""

    ticket: int


class Goodbye(Message, frozen=True, tag="goodbye"):
    """Finish what was accepted and end. Not answered."""

    ticket: int


Request = Put | Fetch | Calibrate | Cancel | Ping | Goodbye

# Manager -> server.


class Ready(Message, frozen=True, tag="ready"):
    """The manager runs; `Known` messages with what it has came before."""

    pid: int


class Known(Message, frozen=True, tag="known"):
    """Records that can be fetched."""

    kind: RecordKind
    keys: bytes
    """KEY_BYTES each, at most KEYS_PER_MESSAGE of them."""


class Gone(Message, frozen=True, tag="gone"):
    """Records that cannot be fetched any more."""

    kind: RecordKind
    keys: bytes


class Stored(Message, frozen=True, tag="stored"):
    """The payload of a `Put` has been read: its slot is free again."""

    ticket: int
    slot: Slot
    accepted: bool
    """False: refused, as everything is full, or the payload is not what its checksum says."""


class Fetched(Message, frozen=True, tag="fetched"):
    """Answer to `Fetch`."""

    ticket: int
    slot: Slot
    key: bytes
    meta: Meta | None = None
    """None: a miss, and no payload."""
    payload: Payload | None = None
    total: int = 0
    """Bytes of the whole record."""
    answered: float = 0.0
    """When the answer was ready, by the clock of `Fetch.deadline`; 0: not said."""


class Calibrated(Message, frozen=True, tag="calibrated"):
    """Answer to `Calibrate`: the epoch can be fetched."""

    ticket: int
    key: bytes | None = None
    """Of the epoch's record; None: the calibration failed."""
    error: str = ""


class Pong(Message, frozen=True, tag="pong"):
    """Answer to `Ping`."""

    ticket: int
    metrics: dict[str, int | float | list[int]] = {}


Reply = Ready | Known | Gone | Stored | Fetched | Calibrated | Pong

_ENCODER = msgspec.msgpack.Encoder()
_REQUESTS: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_REPLIES: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
_T = TypeVar("_T", Request, Reply)


def encode(message: Message) -> bytes:
    """The bytes of a message.

    Raises:
        WireError: it is too long, or a number does not fit.
    """
    try:
        data = _ENCODER.encode(message)
    except (OverflowError, msgspec.MsgspecError) as error:
        raise WireError(f"{type(message).__name__} cannot be encoded: {error}") from error
    if len(data) > MOST_BYTES:
        raise WireError(f"{type(message).__name__} of {len(data)} bytes is longer than {MOST_BYTES}")
    return data


def decode_request(data: bytes) -> Request:
    """A message to the manager.

    Raises:
        WireError: it is none.
    """
    return _decode(data, _REQUESTS)


def decode_reply(data: bytes) -> Reply:
    """A message from the manager.

    Raises:
        WireError: it is none.
    """
    return _decode(data, _REPLIES)


def split_keys(keys: bytes) -> list[bytes]:
    """The keys of a list of keys.

    Raises:
        WireError: it ends within one.
    """
    if len(keys) % KEY_BYTES:
        raise WireError(f"a list of keys of {KEY_BYTES} bytes cannot have {len(keys)} bytes")
    return [keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)]


def _decode(data: bytes, decoder: msgspec.msgpack.Decoder[_T]) -> _T:
    if len(data) > MOST_BYTES:
        raise WireError(f"a message of {len(data)} bytes is longer than {MOST_BYTES}")
    try:
        message = decoder.decode(data)
    # Nested too deeply, or text that is no UTF-8.
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise WireError(f"not a message: {error}") from error
    if message.protocol != PROTOCOL:
        raise WireError(f"a message of protocol {message.protocol}, expected {PROTOCOL}")
    key = getattr(message, "key", None)
    if key is not None and len(key) != KEY_BYTES:
        raise WireError(f"a key has {KEY_BYTES} bytes, got {len(key)}")
    return message
