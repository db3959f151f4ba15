"""The one configuration object: parsed once, validated once, threaded down; nothing deeper reads the environment."""

from __future__ import annotations

import dataclasses
import json
import os

from sglang_mosaic.errors import ConfigError

ENVIRONMENT_VARIABLE = "SGLANG_MOSAIC_CONFIG"
"""Carries the configuration, as JSON, into SGLang's child processes."""

ENCODE_POLICIES = ("pressure", "seal", "off")

MOST_SELECT_STEPS = 16
"""Decode steps that may share a selection: it looks as many tokens ahead, and a kernel is compiled for each number."""

CODECS = ("planes", "topk", "int8", "kivi4", "kivi3", "kivi2", "channel-drop")
"""planes is the codec of this project; the others are baselines to compare with (codec/baselines/)."""


@dataclasses.dataclass(frozen=True)
class MosaicConfig:
    """Settings of one server. The command line's ``--mosaic-*`` flags have the same names (adapter/arguments.py)."""

    encode: str = "pressure"
    """When sealed pages are encoded: ``pressure`` (only when dense frames run out), ``seal`` (as soon as a page leaves
    the recent window of every running request; on a GPU 16 at a time), ``off`` (never; every page stays dense and
    bit-identical)."""
    kv_mib: float | None = None
    """Memory for all KV frames, MiB per rank. None: what SGLang would give its own pool (--mem-fraction-static)."""
    dense_fraction: float = 0.1
    """Share of the KV memory kept as dense frames, unless the reserve of the capacity theorem is larger."""
    window_pages: int = 2
    """Pages at the end of each running request that stay dense, in pages of 64 tokens."""
    calibration_pages: int = 16
    """Sealed pages that must exist before ``encode=seal`` calibrates the codec, in pages of 64 tokens."""
    codec: str = "planes"
    """How pages are compressed."""
    ratio: float = 4.0
    """bf16 bytes of a page per byte of its compressed frame; planes and topk only."""
    max_error: float | None = None
    """Largest relative error of the attention output that a page may be expected to make; pages beyond it stay
    uncompressed as long as others can go. None: no limit."""
    calibration: str | None = None
    """File written by ``sglang-mosaic calibrate``. None: calibrate on the first pages that are compressed."""
    save_calibration: str | None = None
    """File that every calibration of this server is written to."""
    refresh_pages: int = 64
    """Compressed pages after which the codec is calibrated anew, twice as many after that, and so on. 0: never."""
    select: float = 0.0
    """Share of a context's compressed tokens that a decode step reads at most. 0: all of them."""
    select_top_p: float = 1.0
    """Share of the attention mass, sinks and recent tokens included, after which selection stops earlier. Where sinks
    hold most of the mass, the last percent can be most of the output (docs/codec.md)."""
    select_from: int | None = None
    """Compressed tokens of a context below which all are read. None: below what pays (`least_selected`)."""
    select_steps: int = 1
    """Decode steps that share a selection."""
    host_gb: float = 0.0
    """Host memory for evicted pages of this rank, in GiB. 0: they are dropped."""
    host_max_error: float = 0.0
    """Relative error of the attention output that pages on the host may be expected to make, what they make already
    included; 0: nothing is lost there."""
    cold_max_error: float = 0.0
    """The same of the pages that are next to leave the host, which are made smaller still; 0: they are not."""
    disk: str | None = None
    """Directory that pages on the host are written to; they survive the server, and other servers find them."""
    disk_gb: float = 10.0
    """Most of that directory's files, in GiB."""
    restart_s: float = 60.0
    """Longest pause before a manager that ended is started again, in seconds; the first is half a second at most."""
    restore_from: int = 64
    """Tokens of evicted pages in a row below which they are computed again."""
    audit: int | None = None
    """Check every invariant of the pool whenever the server is idle, and stop it on the first violation. A number above
    0: also every so many turns of the scheduler, and that no full page changes. None: never."""
    isolate: bool = False
    """Requests that name no tenant (SGLang's ``cache_salt`` or ``extra_key``) share no page with any other."""

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
        if self.audit is not None and self.audit < 0:
            raise ConfigError(f"--mosaic-audit: got {self.audit}, give a number of scheduler turns, or 0 (when idle).")
        self._check_codec()
        self._check_selection()
        self._check_host()

    def _check_codec(self) -> None:
        if self.codec not in CODECS:
            raise ConfigError(f"--mosaic-codec: got {self.codec!r}, choose one of {', '.join(CODECS)}.")
        if not 1.5 <= self.ratio <= 12.0:
            raise ConfigError(f"--mosaic-ratio: got {self.ratio}, give a number between 1.5 and 12.")
        if self.max_error is not None and not self.max_error > 0:
            raise ConfigError(f"--mosaic-max-error: got {self.max_error}, give a positive number or leave it out.")
        if self.refresh_pages < 0:
            raise ConfigError(f"--mosaic-refresh-pages: got {self.refresh_pages}, give 0 (never) or more.")
        if self.codec != "planes":
            for name, off in (("calibration", None), ("save_calibration", None), ("select", 0.0)):
                if getattr(self, name) != off:
                    flag = f"--mosaic-{name.replace('_', '-')}"
                    raise ConfigError(f"{flag}: got {getattr(self, name)!r}, which needs --mosaic-codec planes.")

    def _check_selection(self) -> None:
        if not 0.0 <= self.select <= 1.0:
            raise ConfigError(f"--mosaic-select: got {self.select}, give a share between 0 (read all) and 1.")
        if not 0.0 < self.select_top_p <= 1.0:
            raise ConfigError(f"--mosaic-select-top-p: got {self.select_top_p}, give a share above 0, at most 1.")
        if self.select_from is not None and self.select_from < 0:
            raise ConfigError(f"--mosaic-select-from: got {self.select_from}, give a number of tokens or leave it out.")
        if not 1 <= self.select_steps <= MOST_SELECT_STEPS:
            raise ConfigError(f"--mosaic-select-steps: got {self.select_steps}, give 1 to {MOST_SELECT_STEPS}.")

    def _check_host(self) -> None:
        if not self.host_gb >= 0:
            raise ConfigError(f"--mosaic-host-gb: got {self.host_gb}, give a number of GiB, or 0 for none.")
        if not 0.0 <= self.host_max_error < 1.0:
            raise ConfigError(f"--mosaic-host-max-error: got {self.host_max_error}, give a share from 0 to below 1.")
        if self.cold_max_error and not self.host_max_error < self.cold_max_error < 1.0:
            raise ConfigError(
                f"--mosaic-cold-max-error: got {self.cold_max_error}, give a share above --mosaic-host-max-error "
                f"({self.host_max_error}) and below 1, or 0 for none."
            )
        if not self.disk_gb > 0:
            raise ConfigError(f"--mosaic-disk-gb: got {self.disk_gb}, give a positive number of GiB.")
        if not self.restart_s > 0:
            raise ConfigError(f"--mosaic-restart-s: got {self.restart_s}, give a positive number of seconds.")
        if self.restore_from < 1:
            raise ConfigError(f"--mosaic-restore-from: got {self.restore_from}, give a number of tokens from 1 on.")
        if not self.host_gb:
            for name, off in (("disk", None), ("host_max_error", 0.0), ("cold_max_error", 0.0)):
                if getattr(self, name) != off:
                    flag = f"--mosaic-{name.replace('_', '-')}"
                    raise ConfigError(f"{flag}: got {getattr(self, name)!r}, which needs --mosaic-host-gb.")
        elif self.codec != "planes":
            raise ConfigError(f"--mosaic-host-gb: got {self.host_gb}, which needs --mosaic-codec planes.")
        elif not self.compresses:
            for name in ("host_max_error", "cold_max_error"):
                if getattr(self, name):
                    flag = f"--mosaic-{name.replace('_', '-')}"
                    raise ConfigError(
                        f"{flag}: got {getattr(self, name)}, which needs --mosaic-encode pressure or seal."
                    )

    @property
    def compresses(self) -> bool:
        return self.encode != "off"

    @property
    def least_selected(self) -> int:
        """Compressed tokens of a context from which a step selects."""
        return 4096 if self.select_from is None else max(self.select_from, 1)

    @property
    def live_epochs(self) -> int:
        """Calibrations whose tables are held at a time. With too few, the next one waits for the last page of the
        oldest to be evicted."""
        if self.codec != "planes":
            return 1
        # One more for pages that another server, or this one in its last life, has left on the host.
        return (3 if self.refresh_pages else 1) + bool(self.host_gb)

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
