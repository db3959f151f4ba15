"""What the references give for a case: the arbiter of the gates."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

from benchmark.kernels.cases import Case, Rotated
from benchmark.kernels.sizes import PAGE
from mosaic_kernels.attend.reference import attend
from mosaic_kernels.combine import reference as combine_reference
from mosaic_kernels.segment_decode.reference import decode, decode_keys, decode_mean_values
from mosaic_kernels.segment_encode.reference import pack
from mosaic_kernels.segment_error.reference import put_header, relative_error
from mosaic_kernels.select import reference as select_reference
from mosaic_kernels.select.selection import Selected


class Decoded(NamedTuple):
    """The pages of a batch, float32, rotated."""

    keys: torch.Tensor
    """[H, P, PAGE, D]."""
    values: torch.Tensor
    """[H, P, PAGE, D]."""
    scanned: torch.Tensor
    """[H, P, PAGE, D], keys of base planes, 0 beyond the scan channels."""
    means: torch.Tensor
    """[H, P, D], mean values."""


def decoded(case: Case) -> Decoded:
    """Every page of the batch by the reference decoder."""
    data = case.pool.data[case.batch.frames.long()]
    heads, pages, dim = case.dims.heads, len(data), case.dims.dim
    keys, values, scanned = (torch.zeros(heads, pages, PAGE, dim, device=data.device) for _ in range(3))
    means = torch.zeros(heads, pages, dim, device=data.device)
    for h, head in enumerate(case.pool.heads):
        for n, fmt in enumerate(head.formats):
            mine = data[:, head.start] == n
            segments = data[mine, head.start : head.start + fmt.segment_bytes]
            if len(segments):
                keys[h, mine], values[h, mine] = decode(segments, fmt)
                leading = decode_keys(segments, fmt, refined=False, channels=head.scan_channels)
                scanned[h, mine, :, : head.scan_channels] = leading
                means[h, mine] = decode_mean_values(segments, fmt)
    return Decoded(keys, values, scanned, means)


def encoded(case: Case, rotated: Rotated) -> torch.Tensor:
    """The bytes of rotated pages, headers left out: uint8 [pages, frame_bytes]."""
    k, v, numbers, data = rotated
    wanted = torch.zeros_like(data)
    for h, head in enumerate(case.pool.heads):
        for n, fmt in enumerate(head.formats):
            mine = numbers[h] == n
            if mine.any():
                segments = torch.zeros(int(mine.sum()), fmt.segment_bytes, dtype=torch.uint8, device=data.device)
                pack(k[h, mine], v[h, mine], fmt, segments)
                wanted[mine, head.start : head.start + fmt.segment_bytes] = segments
    return wanted


def with_headers(case: Case, rotated: Rotated, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`encoded` pages with their headers, and errors [pages, H]."""
    data, errors = data.clone(), torch.zeros(rotated.numbers.T.shape, device=data.device)
    for h, (head, choice) in enumerate(zip(case.pool.heads, case.dense.choices, strict=True)):
        for n, fmt in enumerate(head.formats):
            mine = rotated.numbers[h] == n
            segments = data[mine, head.start : head.start + fmt.segment_bytes]
            k, v = decode(segments, fmt)
            weights = choice.k_weight, choice.v_weights
            error = relative_error(rotated.keys[h, mine] - k, rotated.values[h, mine] - v, *weights)
            put_header(segments, n, error)
            data[mine, head.start : head.start + fmt.segment_bytes], errors[mine, h] = segments, error
    return data, errors


def over_all(case: Case, pages: Decoded) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each item over all of its tokens: out [I, H, group, D], rotated, and lse [I, H, group]."""
    results = []
    for item, (first, last) in enumerate(itertools.pairwise(case.batch.first_page.tolist())):
        k, v = (x[:, first:last].flatten(1, 2) for x in (pages.keys, pages.values))
        out, lse = attend(case.q[item].flatten(0, 1)[None], k, v, case.scale)
        results.append((out.view_as(case.q[item]), lse.view(case.q.shape[1:3])))
    return tuple(torch.stack(x) for x in zip(*results, strict=True))


def over_selected(case: Case, pages: Decoded, selected: Selected, far: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """As `over_all`, of the selected tokens, and with `far` one token per page for the others."""
    results, first = [], case.plan.first.tolist()
    for item, (start, stop) in enumerate(itertools.pairwise(case.batch.first_page.tolist())):
        k, v = (x[:, start:stop].flatten(1, 2) for x in (pages.keys, pages.values))
        chosen = torch.zeros(k.shape[:2], dtype=torch.bool, device=k.device)
        for head, count in enumerate(selected.counts[:, item].tolist()):
            chosen[head, selected.tokens[head, first[item] : first[item] + count].long() - start * PAGE] = True
        others = (selected.far[:, start:stop].transpose(1, 2), pages.means[:, start:stop]) if far else None
        results.append(select_reference.attend_selected(case.q[item], k, v, chosen[:, None], case.scale, others))
    return tuple(torch.stack(x) for x in zip(*results, strict=True))


def joined(parts: tuple[torch.Tensor, torch.Tensor], first_piece: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Results of pieces -> results of items."""
    out, lse = [], []
    for first, last in itertools.pairwise(first_piece.tolist()):
        shares = parts[1][first:last].softmax(0)[..., None]
        out.append((parts[0][first:last] * shares).sum(0))
        lse.append(parts[1][first:last].logsumexp(0))
    return torch.stack(out), torch.stack(lse)


def with_dense(case: Case, of_items: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Attention over the items' results and the dense tokens: [B, H * group, D]."""
    one_each = torch.arange(len(of_items[0]) + 1, device=case.q.device)
    return combine_reference.combine([(*of_items, one_each)], case.batch, case.unrotate, case.dense_out, case.dense_lse)
