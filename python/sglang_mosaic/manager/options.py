"""Settings of one manager, handed to its process as JSON."""

from __future__ import annotations

import dataclasses
import json

from sglang_mosaic.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class ManagerOptions:
    """Checked once, threaded down. Bytes are bytes, times seconds."""

    slot_bytes: int
    """Largest page, in bytes."""
    slots: int = 16
    """Payloads under way at a time, in both directions together."""
    usual_bytes: int = 0
    """Bytes of a slot that most payloads fill: there from the start, and the others once somebody writes to them."""
    host_bytes: int = 1 << 30
    """Most bytes of records in host memory."""
    host_raw_bytes: int = 0
    """Bytes of pages that wait uncompressed in host memory, newest first: they come back several times faster."""
    host_max_error: float = 0.0
    """Relative error of the attention output that recompressed pages may be expected to make; 0: none of their own."""
    cold_max_error: float = 0.0
    """The same of pages that stay cold, which are transform-coded when memory becomes short; 0: none are."""
    rope_frequencies: tuple[float, ...] = ()
    """Radians a token of every pair of channels that RoPE turns, scaling included; none: keys are taken as they are."""
    rope_interleaved: bool = False
    """Pairs are neighbouring channels (GPT-J), not halves of what is turned (NeoX)."""
    disk: str | None = None
    """Directory for records; None: host memory only."""
    disk_bytes: int = 10 << 30
    """Most bytes of its files."""
    rescan_s: float = 5.0
    """Between two looks at what other managers did to it."""
    calibration_threads: int = 1
    """Threads of a calibration's process. Everything else of the manager takes two, and one core at most."""
    nice: int = 10
    """Added to the nice level: the server comes first."""
    ready_s: float = 20.0
    """How long a new manager may take until it is ready."""
    heartbeat_s: float = 1.0
    """Between two pings."""
    silence_s: float = 3.0
    """Unanswered ping after which the manager counts as dead until it speaks again."""
    kill_s: float = 30.0
    """Unanswered ping after which it is killed and replaced."""
    backoff_s: float = 0.5
    """Pause before the first restart; twice as long before each further one, until a manager has lived for a while."""
    most_backoff_s: float = 60.0
    close_s: float = 5.0
    """How long `close` waits for a clean end."""

    def __post_init__(self) -> None:
        for name in ("slot_bytes", "host_bytes", "disk_bytes", "calibration_threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, give at least 1.")
        for name in ("usual_bytes", "host_raw_bytes", "nice"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: got {getattr(self, name)}, give 0 or more.")
        if self.slots < 2:
            raise ConfigError(f"slots: got {self.slots}, give at least 2: one for each direction.")
        for name in ("host_max_error", "cold_max_error"):
            if not 0.0 <= getattr(self, name) < 1.0:
                flag = f"--mosaic-{name.replace('_', '-')}"
                raise ConfigError(f"{flag}: got {getattr(self, name)}, give a share from 0 to below 1.")
        # JSON has lists only.
        object.__setattr__(self, "rope_frequencies", tuple(self.rope_frequencies))
        for name in (
            "rescan_s",
            "ready_s",
            "heartbeat_s",
            "silence_s",
            "kill_s",
            "backoff_s",
            "most_backoff_s",
            "close_s",
        ):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}: got {getattr(self, name)}, give a positive number of seconds.")

    def to_json(self) -> str:
        """For the command line of a manager."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ManagerOptions:
        """
        Raises:
            ConfigError: they are no options.
        """
        try:
            return cls(**json.loads(text))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"not the options of a manager ({error}).") from error
