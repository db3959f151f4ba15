"""Reference selection of tokens from scanned logits, and attention over the selected ones and the far field.

Rows are the query heads of one KV head times the queries, group-major: row g * queries + i is query i.
"""

from __future__ import annotations

import torch

from mosaic_kernels.scan.keys import KEYS, LOWEST, STEPS

PAGE_SIZE = 64


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


def chosen_by(keys: torch.Tensor, steps: int) -> torch.Tensor:
    """Keys by which tokens are chosen that several decode steps read: of a token and those before it, up to `steps` of
    its page, the largest.

    What follows a token that is read now is what is read next wherever a model copies or goes through a list (induction
    heads, arXiv 2209.11895). Without it a selection is of no use to the steps after its own (docs/codec.md).

    Args:
        keys: int16 [..., N], whole pages of PAGE_SIZE tokens.
        steps: 1: the keys themselves.
    """
    paged = keys.unflatten(-1, (-1, PAGE_SIZE))
    found = paged.clone()
    for back in range(1, min(steps, PAGE_SIZE)):
        found[..., back:] = torch.maximum(found[..., back:], paged[..., :-back])
    return found.flatten(-2)


def choose_tokens(keys: torch.Tensor, top_p: float, most: int, steps: int = 1) -> torch.Tensor:
    """The tokens that get most attention, for each query and KV head.

    Args:
        keys: int16 [..., N] (scan/keys.py).
        top_p: share of the attention mass to cover, what is read anyway included; 1: no limit but `most`. Reckoned from
            the keys: of each token the mass of the query head that looks at it most.
        most: tokens at most; of equal keys the first.
        steps: decode steps that read them; above 1 keys are of whole pages, and each counts as `chosen_by` says.

    Returns:
        bool [..., N].
    """
    if steps > 1:
        keys = chosen_by(keys, steps)
    counts = torch.zeros(*keys.shape[:-1], KEYS, dtype=torch.int64, device=keys.device)
    counts.scatter_add_(-1, keys.long(), torch.ones_like(keys, dtype=torch.int64))
    least, spare = threshold(counts, top_p, most)
    ties = keys == least[..., None] - 1
    return (keys >= least[..., None]) | ties & (ties.cumsum(-1) <= spare[..., None])


def threshold(counts: torch.Tensor, top_p: float, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts [..., KEYS] int64 of tokens by key -> the least key of which all are taken, and how many of the next."""
    at_least = counts.flip(-1).cumsum(-1).flip(-1)
    least = (at_least > most).sum(-1)
    spare = most - torch.nn.functional.pad(at_least, (0, 1)).gather(-1, least[..., None]).squeeze(-1)
    if top_p < 1:
        weights = torch.exp(torch.arange(KEYS, device=counts.device, dtype=torch.float32) / STEPS + LOWEST)
        mass = (counts * weights).flip(-1).cumsum(-1).flip(-1)
        wanted = top_p * (1 + mass[..., :1]) - 1
        enough = torch.where(wanted.squeeze(-1) > 0, (mass >= wanted).sum(-1) - 1, KEYS)
        spare = torch.where(enough >= least, 0, spare)
        least = torch.maximum(least, enough)
    return least, spare


def far_logits(keys: torch.Tensor, page_lse: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
    """Log-sum-exp of what each page keeps unselected.

    All query heads of a group are taken to lose the share of a page that the keys say: their own logits need not be
    kept.

    Args:
        keys: int16 [Hkv, Tq, N]; selected: bool [Hkv, Tq, N].
        page_lse: [Hkv, R, P] float32, log-sum-exp of each page's scanned logits, R = group * Tq.

    Returns:
        [Hkv, R, P] float32; -inf: all of the page is selected.
    """
    pages = page_lse.shape[-1]
    mass = torch.exp(keys.float() / STEPS + LOWEST).unflatten(-1, (pages, -1))
    left = (mass * ~selected.unflatten(-1, (pages, -1))).sum(-1) / mass.sum(-1)
    return page_lse + left.log().repeat(1, page_lse.shape[1] // left.shape[1], 1)


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
