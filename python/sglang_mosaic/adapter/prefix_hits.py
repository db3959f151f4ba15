"""Counts how many tokens of prompts came from the prefix cache."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass
class PrefixHits:
    """Totals since the server started. A request that was retracted counts once."""

    computed_tokens: int = 0
    cached_tokens: int = 0
    """Restored ones included."""

    def add(self, prefill: Any) -> None:
        """Count one prefill batch, as SGLang reports it (its PrefillStats)."""
        self.computed_tokens += prefill.log_input_tokens - prefill.reprocessed_log_input_tokens
        self.cached_tokens += prefill.log_hit_tokens - prefill.reprocessed_log_hit_tokens
