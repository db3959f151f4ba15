"""Reference attention with log-sum-exp, blocked over the keys."""

from __future__ import annotations

import torch

_SCORES_PER_BLOCK = {"cpu": 1 << 22, "cuda": 1 << 26}  # 16 or 256 MiB of float32 scores at a time


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal_offset: int | None = None,
    block_keys: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of a few queries over many keys; query head h reads KV head h // (Hq / Hkv).

    Keys and values are head-major, the order in which `segment_decode` writes them, so that neither side copies:
    `decode(...)[0].transpose(0, 1).flatten(1, 2)`. Token-major tensors [Tk, Hkv, D] are passed as
    `x.transpose(0, 1)`, without a copy too.

    Args:
        q: [Tq, Hq, Dk] float.
        k: [Hkv, Tk, Dk] float; v: [Hkv, Tk, Dv] float. Hq is a multiple of Hkv; Tk may be 0.
        scale: factor of the logits, usually Dk ** -0.5 of the model.
        causal_offset: query i sees the keys j <= i + causal_offset; None: every query sees every key.
        block_keys: keys per step, which bounds memory; None chooses 16 MiB of scores, on a
            GPU 256.

    Returns:
        out [Tq, Hq, Dv] float32 and lse [Tq, Hq] float32, the natural log of the sum of exponentials of the scaled
        logits. A query that sees no key has out 0 and lse -inf.

    Raises:
        ValueError: shapes do not fit together.
    """
    tokens, q_heads, k_dim = q.shape
    heads, keys, v_dim = v.shape
    if k.shape != (heads, keys, k_dim) or q_heads % heads:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must be [Tq, Hq, Dk], [Hkv, Tk, Dk] and "
            "[Hkv, Tk, Dv] with Hq a multiple of Hkv"
        )
    group = q_heads // heads
    rows = group * tokens
    # The scale goes into the few queries instead of the many logits. Rows of a KV head: group-major, then query.
    query = (q.float() * scale).view(tokens, heads, group, k_dim).permute(1, 2, 0, 3).reshape(heads, rows, k_dim)
    if causal_offset is not None:
        keys = max(min(keys, tokens + causal_offset), 0)
    step = block_keys or max(_SCORES_PER_BLOCK[q.device.type] // max(heads * rows, 1), 64)

    out = query.new_zeros(heads, rows, v_dim)
    total = query.new_zeros(heads, rows, 1)
    top = query.new_full((heads, rows, 1), -torch.inf)
    for start in range(0, keys, step):
        stop = min(start + step, keys)
        scores = torch.bmm(query, k[:, start:stop].float().transpose(1, 2))
        if causal_offset is not None and stop > causal_offset + 1:
            _mask(scores.view(heads, group, tokens, stop - start), start, causal_offset)
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        # A row without a visible key so far keeps -inf; shifting by 0 then avoids inf - inf.
        shift = torch.where(new_top == -torch.inf, 0.0, new_top)
        weights = scores.sub_(shift).exp_()
        decay = torch.exp(top - shift)
        total = total * decay + weights.sum(-1, keepdim=True)
        out = torch.baddbmm(out.mul_(decay), weights, v[:, start:stop].float())
        top = new_top
    # A visible key contributes exp(0) = 1 at the maximum, so only empty rows are below 1.
    out /= total.clamp_min(1.0)
    lse = torch.where(total > 0, top + torch.log(total), -torch.inf)
    out = out.view(heads, group, tokens, v_dim).permute(2, 0, 1, 3).reshape(tokens, q_heads, v_dim)
    return out, lse.view(heads, group, tokens).permute(2, 0, 1).reshape(tokens, q_heads)


def _mask(scores: torch.Tensor, start: int, causal_offset: int) -> None:
    """Hide the keys j > i + causal_offset. scores [Hkv, group, Tq, block], the block's first key is `start`."""
    tokens, block = scores.shape[-2:]
    last_seen = torch.arange(tokens, device=scores.device)[:, None] + causal_offset
    hidden = torch.arange(start, start + block, device=scores.device) > last_seen
    scores.masked_fill_(hidden, -torch.inf)
