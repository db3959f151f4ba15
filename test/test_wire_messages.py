"""Messages: what may not be one is refused by one kind of exception, and nothing else ever happens."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_mosaic.wire import messages as wire
from sglang_mosaic.wire.messages import Meta, Payload, RecordKind, Slot, WireError

KEY = bytes(range(16))
PAYLOAD = Payload(Slot(3, 7), 100, 2**64 - 1)
META = Meta(RecordKind.PAGE, 3, "0123456789abcdef")
REQUESTS = [
    wire.Put(ticket=1, key=KEY, meta=META, payload=PAYLOAD, total=100),
    wire.Fetch(ticket=2, kind=RecordKind.EPOCH, key=KEY, slot=Slot(0, 1), deadline=12.5),
    wire.Calibrate(ticket=3, key=KEY),
    wire.Cancel(ticket=4, cancelled=3),
    wire.Ping(ticket=5),
    wire.Goodbye(ticket=6),
]
REPLIES = [
    wire.Ready(pid=12),
    wire.Known(kind=RecordKind.PAGE, keys=KEY * 3),
    wire.Gone(kind=RecordKind.PAGE, keys=b""),
    wire.Stored(ticket=1, slot=Slot(3, 7), accepted=True),
    wire.Fetched(ticket=2, slot=Slot(0, 1), key=KEY, meta=META, payload=PAYLOAD, total=100),
    wire.Fetched(ticket=2, slot=Slot(0, 1), key=KEY),
    wire.Calibrated(ticket=3, key=KEY),
    wire.Pong(ticket=5, metrics={"a": 1, "b": 0.5, "c": [1, 2]}),
]
CODED = [wire.encode(message) for message in REQUESTS + REPLIES]


def name(message: object) -> str:
    return type(message).__name__


@pytest.mark.parametrize("message", REQUESTS, ids=name)
def test_requests_come_back(message: wire.Request) -> None:
    assert wire.decode_request(wire.encode(message)) == message
    with pytest.raises(WireError):
        wire.decode_reply(wire.encode(message))


@pytest.mark.parametrize("message", REPLIES, ids=name)
def test_replies_come_back(message: wire.Reply) -> None:
    assert wire.decode_reply(wire.encode(message)) == message
    with pytest.raises(WireError):
        wire.decode_request(wire.encode(message))


def test_every_message_is_tried_here() -> None:
    assert {type(m) for m in REQUESTS} == set(wire.Request.__args__)
    assert {type(m) for m in REPLIES} == set(wire.Reply.__args__)


@pytest.mark.parametrize("message", REQUESTS, ids=name)
def test_another_protocol_is_refused(message: wire.Request) -> None:
    later = msgspec.structs.replace(message, protocol=wire.PROTOCOL + 1)
    with pytest.raises(WireError, match=f"protocol {wire.PROTOCOL + 1}"):
        wire.decode_request(wire.encode(later))


@pytest.mark.parametrize("data", CODED)
def test_a_field_that_is_not_known_is_skipped(data: bytes) -> None:
    fields = msgspec.msgpack.decode(data)
    extended = msgspec.msgpack.encode({**fields, "added_later": [1, {"x": b"y"}]})
    decode = wire.decode_request if data in CODED[: len(REQUESTS)] else wire.decode_reply
    assert decode(extended) == decode(data)


def test_long_messages_are_refused_before_they_are_looked_at() -> None:
    # Valid but for its length.
    long = msgspec.msgpack.encode({"is": "ping", "ticket": 1, "protocol": 1, "more": b"x" * wire.MOST_BYTES})
    with pytest.raises(WireError, match="longer than"):
        wire.decode_request(long)
    with pytest.raises(WireError, match="longer than"):
        wire.encode(wire.Known(kind=RecordKind.PAGE, keys=KEY * 5000))


def test_a_full_list_of_keys_fits() -> None:
    keys = KEY * wire.KEYS_PER_MESSAGE
    assert wire.split_keys(wire.decode_reply(wire.encode(wire.Known(kind=RecordKind.PAGE, keys=keys))).keys)


@pytest.mark.parametrize("key", [b"", b"x", KEY + b"x"])
def test_keys_have_one_length(key: bytes) -> None:
    with pytest.raises(WireError):
        wire.decode_request(wire.encode(wire.Calibrate(ticket=1, key=key)))
    with pytest.raises(WireError):
        wire.split_keys(KEY + b"x")


@given(st.binary(max_size=300))
def test_random_bytes_are_refused(data: bytes) -> None:
    for decode in (wire.decode_request, wire.decode_reply):
        with pytest.raises(WireError):
            decode(data)


def test_deep_nesting_is_refused() -> None:
    data = b"\x81\xa4more" * 20000
    with pytest.raises(WireError):
        wire.decode_request(data[: wire.MOST_BYTES])


@given(st.sampled_from(CODED), st.data())
def test_damaged_messages_are_refused_or_well_formed(data: bytes, draw: st.DataObject) -> None:
    damaged = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 4))):
        at = draw.draw(st.integers(0, len(damaged) - 1))
        damaged[at] ^= 1 << draw.draw(st.integers(0, 7))
    damaged = bytes(damaged)[: draw.draw(st.integers(0, len(damaged)))]
    for decode, kinds in ((wire.decode_request, wire.Request), (wire.decode_reply, wire.Reply)):
        try:
            message = decode(damaged)
        except WireError:
            continue
        # What is accepted has the right types all through: it can be written again.
        assert isinstance(message, kinds)
        assert decode(wire.encode(message)) == message
