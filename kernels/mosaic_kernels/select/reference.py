"""Reference selection of tokens from scanned logits, and attention over the selected ones and the far field.

Rows are the query heads of one KV head times the queries, group-major: row g * queries + i is query i.
"""

from __future__ import annotations

import torch


def rows_of(q: torch.Tensor, heads: int) -> torch.Tensor:
    """[Tq, Hq, D] any float -> float32 [Hkv, group * Tq, D]; query head h reads KV head h // group."""
    tokens, q_heads, dim = q.shape
    group = q_heads // heads
    return q.float().view(tokens, heads, group, dim).permute(1, 2, 0, 3).reshape(heads, group * tokens, dim)


def from_rows(x: torch.Tensor, tokens: int) -> torch.Tensor:
    """[Hkv, group * Tq, ...] -> [Tq, Hq, ...], the reverse of `rows_of`."""
    heads, rows = x.shape[:2]
    x = x.view(heads, rows // tokens, tokens, *x.shape[2:])
    return x.movedim(2, 0).flatten(1, 2)


def choose_tokens(
    scan_logits: torch.Tensor, known_lse: torch.Tensor, queries: int, top_p: float, most: int
) -> torch.Tensor:
    """The tokens that hold most of the attention, for each query and KV head.

    Args:
        scan_logits: [Hkv, R, N] float32, approximate logits.
        known_lse: [Hkv, R] float32, log-sum-exp over tokens that are read anyway; -inf: none.
        queries: Tq, R = group * Tq.
        top_p: share of the attention mass to cover, averaged over the group; what is read anyway counts.
        most: tokens at most.

    Returns:
        bool [Hkv, Tq, N].
    """
    total = torch.logaddexp(scan_logits.logsumexp(-1), known_lse)[..., None]
    heads, _, tokens = scan_logits.shape
    mass = torch.exp(scan_logits - total).view(heads, -1, queries, tokens).mean(1)
    most = min(most, tokens)
    largest, which = mass.topk(most, dim=-1)
    before = largest.cumsum(-1) - largest + (1 - mass.sum(-1, keepdim=True))
    return torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, which, before < top_p)


def far_logits(scan_logits: torch.Tensor, selected: torch.Tensor, page_size: int) -> torch.Tensor:
    """Log-sum-exp of what each page keeps unselected: [Hkv, R, N], bool [Hkv, Tq, N] -> [Hkv, R, N / page_size]."""
    selected = selected.repeat(1, scan_logits.shape[1] // selected.shape[1], 1)
    return scan_logits.masked_fill(selected, -torch.inf).unflatten(-1, (-1, page_size)).logsumexp(-1)


def attend_selected(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    selected: torch.Tensor,
    scale: float,
    far: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the selected tokens, every page's other tokens being one token with its mean value.

    Args:
        q: [Hkv, R, Dk] float32.
        k: [Hkv, N, Dk] float32; v: [Hkv, N, Dv] float32.
        selected: bool [Hkv, Tq, N].
        scale: factor of the logits.
        far: logits [Hkv, R, P], -inf for nothing, and mean values [Hkv, P, Dv]; None: unselected tokens do not count.

    Returns:
        out [Hkv, R, Dv] float32 and lse [Hkv, R]; nothing selected and nothing far: 0 and -inf.
    """
    logits = (q * scale) @ k.transpose(1, 2)
    logits.masked_fill_(~selected.repeat(1, q.shape[1] // selected.shape[1], 1), -torch.inf)
    if far is not None:
        logits, v = torch.cat((logits, far[0]), -1), torch.cat((v, far[1]), 1)
    lse = logits.logsumexp(-1)
    weights = torch.exp(logits - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
    return weights @ v, lse
