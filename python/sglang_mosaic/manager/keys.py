"""Keys of records: what a page holds follows from the tokens up to its end and from who reads them how.

Cryptographic, because prompts come from anyone: two prompts made to collide would read each other's pages.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from sglang_mosaic.page import PAGE_SIZE
from sglang_mosaic.wire.messages import KEY_BYTES


def namespace(*parts: str | int | None) -> bytes:
    """The root of all chains of one kind of pages: of one model, rank, revision of the byte format, and so on."""
    return _hash(b"namespace", *(repr(part).encode() for part in parts))


def page_keys(parent: bytes, tokens: Sequence[int], extra: str | None = None) -> list[bytes]:
    """Keys of the full pages of a run of tokens.

    Args:
        parent: key of the page before it, or a namespace where a sequence starts.
        tokens: ids, from a page border on; what fills no page is left out.
        extra: SGLang's extra_key (LoRA, a tenant's salt), for the page that starts a sequence; later pages inherit it.
    """
    keys = []
    salt = b"" if extra is None else b"extra" + extra.encode()
    for start in range(0, len(tokens) - PAGE_SIZE + 1, PAGE_SIZE):
        parent = _hash(parent, array("q", tokens[start : start + PAGE_SIZE]).tobytes(), salt)
        keys.append(parent)
        salt = b""
    return keys


def epoch_key(hash_: str) -> bytes:
    """The key of the record of an epoch."""
    return _hash(b"epoch", hash_.encode())


def transform_key(hash_: str) -> bytes:
    """The key of the record of the transform of an epoch's cold pages."""
    return _hash(b"transform", hash_.encode())


def statistics_key(ticket: int) -> bytes:
    """The key of statistics on their way to a calibration."""
    return _hash(b"statistics", str(ticket).encode())


def _hash(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
