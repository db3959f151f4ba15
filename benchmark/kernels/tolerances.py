"""Errors in units of what is tolerated, and why it is: above 1, or not a number, a gate fails."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

# float16 has 11 bits: products of a rounded query, or of rounded weights, with exact codes.
LOGITS, OUTPUT = 5e-3, 5e-3
# Of rounded K: of base planes, or with a token's own offsets.
ROUNDED_LOGITS = 0.02
# An error of ROUNDED_LOGITS moves the share of the dense tokens by up to a quarter of it, and the two outputs differ by
# up to twice the largest value.
MERGED = 1e-2
# Weights rounded to the 8 bits of bfloat16, by 2^-9 of each at most, against the largest of values that weigh alike.
WEIGHTS = 1e-2
# A basis in two parts of 11 bits times values of at most 11: 2^-22 of every product, and sums that tensor cores cut.
TURNED = 3e-5
# One step of float16, 2^-10 of a value, where the two round it apart, or the interpreter cuts bits off; twice that.
HALF = 2e-3
OTHER_KEYS = 0.05
"""Share of keys that may differ, by one."""


def equal(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """To the last bit, or not at all."""
    return 0.0 if all(torch.equal(found.cpu(), wanted.cpu()) for found, wanted in pairs) else math.inf


def of_attention(
    found: tuple[torch.Tensor, torch.Tensor], wanted: tuple[torch.Tensor, torch.Tensor], logits: float
) -> float:
    """Of an output and its log-sum-exp."""
    return worst(by_row(found[0], wanted[0], OUTPUT), float((found[1] - wanted[1]).abs().max()) / logits)


def by_row(found: torch.Tensor, wanted: torch.Tensor, relative: float) -> float:
    """In shares of the largest value of each row."""
    bound = relative * wanted.abs().amax(-1, keepdim=True).clamp_min(1e-3)
    return float(((found - wanted).abs() / bound).max())


def elementwise(found: torch.Tensor, wanted: torch.Tensor, relative: float, absolute: float) -> float:
    error = (found - wanted).abs() / (absolute + relative * wanted.abs())
    # Equal infinities.
    return float(torch.where(found == wanted, 0.0, error).max())


def worst(*errors: float) -> float:
    """The largest; not a number if any is not."""
    return math.nan if any(map(math.isnan, errors)) else max(errors)
