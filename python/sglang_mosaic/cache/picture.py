"""The mosaic of one layer as a picture: how many bits each group of channels of each segment has."""

from __future__ import annotations

import torch

from mosaic_kernels.segment import GROUP, SegmentFormat
from sglang_mosaic.cache.memory import PageMemory
from sglang_mosaic.codec.plan import Format, LayerPlan
from sglang_mosaic.codec.planes import PlanesEpoch

MOST_PAGES = 512
"""Pages that a picture shows: more than a screen has columns for."""


def layer_picture(memory: PageMemory, layer: int, most_pages: int = MOST_PAGES) -> dict[str, object]:
    """Formats of one layer's segments, JSON-serialisable.

    Waits for the device, a step at most: for people who look, not for every step. A page that is being encoded at this
    very moment may be shown as what its frame held before.

    Args:
        memory: the pool.
        layer: 0 to its number of layers - 1.
        most_pages: pages shown at most, the first ones by number.

    Returns:
        ``error`` if there is nothing to show, or

        - ``layer``, ``group`` (channels that share a width), ``ratio_by_layer`` (bf16 bytes per byte, of the epoch that
          new pages are encoded with);
        - ``epochs``: per live calibration its ``hash`` and its ``heads``, each with ``segment_bytes`` and ``formats``
          (`_format`);
        - ``pages``: ``total`` compressed pages; of those shown their ``numbers``, their ``epochs`` (indices into the
          above) and their ``formats`` [head][page] (indices into the head's; None: not known).
    """
    layers = len(memory.dense_k)
    if not 0 <= layer < layers:
        return {"error": f"layer: got {layer}, give one of this pool's, 0 to {layers - 1}."}
    epochs = {number: memory.epochs[number] for number in memory.epochs.numbers}
    planes = {number: epoch for number, epoch in epochs.items() if isinstance(epoch, PlanesEpoch)}
    if not planes:
        return {"error": "nothing has been compressed yet" if not epochs else "only --mosaic-codec planes has formats"}
    return {
        "layer": layer,
        "group": GROUP,
        "ratio_by_layer": _ratios(memory),
        "epochs": [{"hash": epoch.hash, "heads": _heads(epoch.layers[layer])} for epoch in planes.values()],
        "pages": _pages(memory, planes, layer, most_pages),
    }


def _ratios(memory: PageMemory) -> list[float]:
    epoch, layers = memory.epochs.current, len(memory.dense_k)
    if epoch is None:
        return []
    dense = memory.plan.frame_bytes.dense / layers
    spans = [epoch.span(layer) for layer in range(layers)]
    return [dense / (span.stop - span.start) for span in spans]


def _heads(plan: LayerPlan) -> list[dict[str, object]]:
    return [
        {"segment_bytes": head.segment_bytes, "formats": [_format(fmt) for fmt in head.formats]} for head in plan.heads
    ]


def _format(fmt: Format) -> dict[str, object]:
    """``planes``: bits of each group of K and of V, and tokens kept uncompressed. ``topk``: channels kept per token."""
    if isinstance(fmt, SegmentFormat):
        return {"kind": "planes", "k_bits": fmt.k_bits, "v_bits": fmt.v_bits, "exceptions": fmt.exceptions}
    return {
        "kind": "topk",
        "k_groups": fmt.k_dim // GROUP,
        "v_groups": fmt.v_dim // GROUP,
        "k_keep": fmt.k_keep,
        "v_keep": fmt.v_keep,
    }


def _pages(memory: PageMemory, epochs: dict[int, PlanesEpoch], layer: int, most: int) -> dict[str, object]:
    pending = memory.lifecycle.pending_pages
    compressed = [
        (page, frame)
        for page, frame in enumerate(memory.lifecycle.frame)
        if frame >= memory.table.first_mosaic and page not in pending
    ]
    shown = compressed[:most]
    numbers = memory.epochs.numbers_of(torch.tensor([frame for _, frame in shown], dtype=torch.int64)).tolist()
    heads = len(next(iter(epochs.values())).layers[layer].heads)
    formats: list[list[int | None]] = [[None] * len(shown) for _ in range(heads)]
    for number, epoch in epochs.items():
        places = [i for i, of_page in enumerate(numbers) if of_page == number]
        for h, found in enumerate(_format_numbers(memory, epoch, layer, [shown[i][1] for i in places])):
            known = len(epoch.layers[layer].heads[h].formats)
            for i, fmt in zip(places, found, strict=True):
                formats[h][i] = fmt if fmt < known else None
    order = list(epochs)
    return {
        "total": len(compressed),
        "numbers": [page for page, _ in shown],
        "epochs": [order.index(number) if number in epochs else None for number in numbers],
        "formats": formats,
    }


def _format_numbers(memory: PageMemory, epoch: PlanesEpoch, layer: int, frames: list[int]) -> list[list[int]]:
    """[head][frame], as the segments' headers have them."""
    device = memory.slab.frames.device
    rows = torch.tensor(frames, dtype=torch.int64, device=device) - memory.table.first_mosaic
    headers = torch.tensor(epoch.headers(layer), device=device)
    return memory.slab.frames[rows[:, None], headers].T.tolist()
