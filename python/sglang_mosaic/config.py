"""The one configuration object: parsed once, validated once, threaded down; nothing deeper reads the environment."""

from __future__ import annotations

import dataclasses
import json
import os

from sglang_mosaic.errors import ConfigError

ENVIRONMENT_VARIABLE = "SGLANG_MOSAIC_CONFIG"
"""Carries the configuration, as JSON, into SGLang's child processes."""

ENCODE_POLICIES = ("pressure", "seal", "off")


@dataclasses.dataclass(frozen=True)
class MosaicConfig:
    """Settings of one server. The command line's ``--mosaic-*`` flags have the same names (adapter/arguments.py)."""

    encode: str = "pressure"
    """When sealed pages are encoded: ``pressure`` (only when dense frames run out), ``seal`` (as soon as a page leaves
    the recent window of every running request), ``off`` (never; every page stays dense and bit-identical)."""
    kv_mib: float | None = None
    """Memory for all KV frames, MiB per rank. None: what SGLang would give its own pool (--mem-fraction-static)."""
    dense_fraction: float = 0.1
    """Share of the KV memory kept as dense frames, unless the reserve of the capacity theorem is larger."""
    window_pages: int = 2
    """Pages at the end of each running request that stay dense, in pages of 64 tokens."""
    calibration_pages: int = 16
    """Sealed pages that must exist before ``encode=seal`` calibrates the codec, in pages of 64 tokens."""
    audit: bool = False
    """Check every invariant of the pool whenever the server is idle, and stop it on the first violation."""

    def __post_init__(self) -> None:
        if self.encode not in ENCODE_POLICIES:
            raise ConfigError(f"--mosaic-encode: got {self.encode!r}, choose one of {', '.join(ENCODE_POLICIES)}.")
        if self.kv_mib is not None and not self.kv_mib > 0:
            raise ConfigError(f"--mosaic-kv-mib: got {self.kv_mib}, give a positive number of MiB or leave it out.")
        if not 0.0 <= self.dense_fraction <= 1.0:
            raise ConfigError(f"--mosaic-dense-fraction: got {self.dense_fraction}, give a number between 0 and 1.")
        if self.window_pages < 1:
            raise ConfigError(
                f"--mosaic-window-pages: got {self.window_pages}, give at least 1 (the page being written)."
            )
        if self.calibration_pages < 1:
            raise ConfigError(f"--mosaic-calibration-pages: got {self.calibration_pages}, give at least 1.")

    @property
    def compresses(self) -> bool:
        return self.encode != "off"

    def store(self) -> None:
        """Publish this configuration to the processes that this one will start."""
        os.environ[ENVIRONMENT_VARIABLE] = json.dumps(dataclasses.asdict(self))

    @classmethod
    def load(cls) -> MosaicConfig:
        """The configuration that the parent process stored, or the defaults.

        Raises:
            ConfigError: the variable holds something else than this class's fields.
        """
        text = os.environ.get(ENVIRONMENT_VARIABLE)
        if not text:
            return cls()
        try:
            return cls(**json.loads(text))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{ENVIRONMENT_VARIABLE}: found {text!r}, which is not a sglang_mosaic configuration ({error}); "
                "unset it or call sglang_mosaic.configure()."
            ) from error
