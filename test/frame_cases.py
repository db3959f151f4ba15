"""Pools of compressed frames of several epochs and formats, with what the reference decodes from them."""

from dataclasses import dataclass

import torch

from mosaic_kernels.page_batch import Item, PageBatch, plan
from mosaic_kernels.segment import SegmentFormat
from mosaic_kernels.segment_decode import reference as planes
from mosaic_kernels.segment_encode.reference import pack
from mosaic_kernels.segment_table import HeadFormats, SegmentTable, make_table
from mosaic_kernels.topk import reference as topk
from mosaic_kernels.topk.segment import TopKFormat
from triton_device import DEVICE


@dataclass
class Pool:
    """`frames` frames, the last of them never encoded."""

    data: torch.Tensor
    table: SegmentTable
    epochs: list[list[HeadFormats]]
    epoch_of: list[int]

    @property
    def heads(self):
        return self.table.heads

    def decoded(self, frames, scan=False):
        """K [H, P, T, Dk] and V of frames, or, for `scan`, K as it sees it."""
        keys, values = [], []
        for frame in frames:
            k, v = zip(*(self._segment(frame, head, scan) for head in self.epochs[self.epoch_of[frame]]), strict=True)
            keys.append(torch.stack(k))
            values.append(torch.stack(v))
        return torch.stack(keys, 1).to(DEVICE), torch.stack(values, 1).to(DEVICE)

    def _segment(self, frame, head, scan):
        segment = self.data.cpu()[frame, head.start :]
        fmt = head.formats[int(segment[0])]
        segment = segment[None, : fmt.segment_bytes]
        k, v = (topk if isinstance(fmt, TopKFormat) else planes).decode(segment, fmt)
        if scan:
            if isinstance(fmt, SegmentFormat):
                k = planes.decode_keys(segment, fmt, refined=False, channels=head.scan_channels)
            k = torch.nn.functional.pad(k[..., : head.scan_channels], (0, fmt.k_dim - head.scan_channels))
        return k[0], v[0]


def widths(dim, generator):
    """Random bits of the groups of a tensor, from many to few."""
    bits = torch.tensor((0, 1, 2, 3, 4, 5, 6, 8))[torch.randint(8, (dim // 16,), generator=generator)]
    return tuple(sorted(bits.tolist(), reverse=True))


def make_pool(
    frames=8, heads=2, k_dim=64, v_dim=64, epochs=1, formats=2, sparse=True, exceptions=True, page_size=64, seed=0
):
    """Random formats in every head, pages of normal values around a mean; bytes that belong to nobody are poison."""
    generator = torch.Generator().manual_seed(seed)
    plans, frame_bytes = [], 0
    for _ in range(epochs):
        at, plan_of_epoch = 32, []
        for _ in range(heads):
            found = [
                SegmentFormat(
                    page_size=page_size, k_dim=k_dim, v_dim=v_dim,
                    k_bits=widths(k_dim, generator), v_bits=widths(v_dim, generator),
                    exceptions=3 if exceptions and n % 2 else 0,
                )
                for n in range(formats)
            ]  # fmt: skip
            if sparse:
                found.append(
                    TopKFormat(page_size=page_size, k_dim=k_dim, v_dim=v_dim, k_keep=k_dim // 3, v_keep=v_dim // 4)
                )
            channels = 16 * int(torch.randint(1, k_dim // 16 + 1, (1,), generator=generator))
            bias = (-0.25, float("-inf"))[int(torch.randint(2, (1,), generator=generator))]
            plan_of_epoch.append(HeadFormats(at, tuple(found), channels, bias))
            at += max(fmt.segment_bytes for fmt in found) + 16
        plans.append(plan_of_epoch)
        frame_bytes = max(frame_bytes, at)
    data = torch.full((frames, -(-frame_bytes // 16) * 16), 0xFF, dtype=torch.uint8)
    epoch_of = []
    for frame in range(frames - 1):
        epoch_of.append(frame % epochs)
        for head in plans[epoch_of[-1]]:
            number = int(torch.randint(len(head.formats), (1,), generator=generator))
            fmt = head.formats[number]
            k, v = (torch.randn(1, page_size, dim, generator=generator) for dim in (k_dim, v_dim))
            k += 2 * torch.randn(k_dim, generator=generator)
            segment = torch.zeros(1, fmt.segment_bytes, dtype=torch.uint8)
            (topk.pack if isinstance(fmt, TopKFormat) else pack)(k, v, fmt, segment)
            segment[0, 0] = number
            data[frame, head.start : head.start + fmt.segment_bytes] = segment[0]
    return Pool(data.to(DEVICE), make_table(plans, DEVICE), plans, [*epoch_of, 0])


def make_batch(pool, lengths, seed=0, programs=64, **options) -> PageBatch:
    """Requests of so many pages, drawn from the encoded frames, an item for each epoch that occurs."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for request, length in enumerate(lengths):
        frames = torch.randint(len(pool.data) - 1, (length,), generator=generator).tolist()
        for epoch in range(len(pool.epochs)):
            own = [frame for frame in frames if pool.epoch_of[frame] == epoch]
            if own:
                items.append(Item(request, epoch, own))
    return plan(items, len(lengths), pool.heads, programs, DEVICE, **options)


def make_queries(batch, heads, group, dim, seed=0):
    """float32 [items, H, group, dim]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(batch.epochs), heads, group, dim, generator=generator).to(DEVICE)
