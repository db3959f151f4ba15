"""One line of the doctor's report."""

from __future__ import annotations

import dataclasses

OK, WARN, FAIL = "OK", "WARN", "FAIL"


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one check found and, unless it is OK, what to change."""

    level: str
    check: str
    text: str
