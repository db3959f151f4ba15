"""What the tests of the manager share: a small epoch with frames, and managers in every way that there is."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from mosaic_kernels.segment import REVISION
from sglang_mosaic.codec import LayerSample, PlanesCodec, PlanesEpoch
from sglang_mosaic.codec.storage import epoch_to_bytes
from sglang_mosaic.manager.client import Completion, ManagerClient, Ticket
from sglang_mosaic.manager.keys import namespace, page_keys
from sglang_mosaic.wire.messages import Meta, RecordKind

LAYERS, HEADS, DIM, PAGES = 2, 2, 32, 24
PATIENCE_S = 20.0
"""How long a test waits for something that must happen."""


class Frames(NamedTuple):
    """An epoch and what it encoded."""

    codec: PlanesCodec
    samples: list[LayerSample]
    epoch: PlanesEpoch
    epoch_bytes: bytes
    frames: list[bytes]
    meta: Meta
    keys: list[bytes]


@functools.cache
def frames(ratio: float = 3.0) -> Frames:
    """Pages whose channels differ in energy, as those of models do."""
    torch.manual_seed(0)
    energy = torch.logspace(0.5, -1.5, DIM)
    k, v = (
        [torch.randn(PAGES, 64, HEADS, DIM) * energy + torch.randn(PAGES, 1, HEADS, DIM) for _ in range(LAYERS)]
        for _ in range(2)
    )
    codec = PlanesCodec(LAYERS, HEADS, DIM, DIM, ratio=ratio)
    for layer in range(LAYERS):
        codec.observe_queries(layer, torch.randn(64, HEADS * 2, DIM))
    samples = [LayerSample(k[layer], v[layer]) for layer in range(LAYERS)]
    epoch = codec.calibrate(samples)
    data = torch.cat([epoch.encode(layer, k[layer], v[layer])[0] for layer in range(LAYERS)], 1)
    meta = Meta(RecordKind.PAGE, REVISION, epoch.hash)
    keys = page_keys(namespace("test"), range(64 * PAGES))
    return Frames(codec, samples, epoch, epoch_to_bytes(epoch), [bytes(row) for row in data.numpy()], meta, keys)


def waves(patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Turns of a loop that waits for something; fails when it does not come."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        yield
        time.sleep(0.001)
    raise AssertionError(f"nothing came of it in {patience_s:g} s")


def until(client: ManagerClient, condition: Callable[[], bool]) -> None:
    """Poll until a condition holds; nothing may complete meanwhile."""
    for _ in waves():
        assert client.poll() == []
        if condition():
            return


def answer(client: ManagerClient, ticket: Ticket) -> Completion:
    """Poll until a ticket is answered; nothing else may be."""
    for _ in waves():
        for completion in client.poll():
            assert completion.ticket == ticket
            return completion
    raise AssertionError("unreachable")


def put(client: ManagerClient, key: bytes, meta: Meta, data: bytes) -> None:
    """Put a page, however often slots run out."""
    for _ in waves():
        if client.put(key, meta, data):
            return
        client.poll()


def manager_metric(client: ManagerClient, name: str) -> int:
    """A counter of the manager, 0 before its first heartbeat."""
    return client.stats()["manager"].get(name, 0)


def page_error(epoch: PlanesEpoch, frame: bytes, other: bytes) -> float:
    """Weighted squared difference of two frames in the attention output, mean over segments, by the codec's decoder."""
    data = torch.from_numpy(np.stack([np.frombuffer(x, np.uint8) for x in (frame, other)]))
    total = []
    for layer, plan in enumerate(epoch.layers):
        k, v = epoch.decode(layer, data[:, epoch.span(layer)])
        weights = plan.basis.v_weights.double()
        for h, head in enumerate(plan.heads):
            k_squares = (k[0, h] - k[1, h]).double().square().sum() * head.k_weight
            v_squares = ((v[0, h] - v[1, h]).double().square() * weights[h]).sum() * head.v_weight
            total.append(float(k_squares + v_squares))
    return float(np.mean(total))
