"""Calibrations of a server: read at start-up, written whenever one was made."""

from __future__ import annotations

import logging
from pathlib import Path

from sglang_mosaic.adapter.geometry import Geometry
from sglang_mosaic.codec.base import Codec
from sglang_mosaic.codec.planes import PlanesEpoch
from sglang_mosaic.codec.storage import load_epoch, save_epoch
from sglang_mosaic.config import MosaicConfig
from sglang_mosaic.errors import ConfigError
from sglang_mosaic.page import PAGE_SIZE

logger = logging.getLogger(__name__)


def load_calibration(config: MosaicConfig, codec: Codec, geometry: Geometry) -> PlanesEpoch | None:
    """The epoch of --mosaic-calibration, if one is given.

    Raises:
        SystemExit: the file is no calibration, or one for another cache.
    """
    if config.calibration is None or not config.compresses:
        return None
    try:
        epoch = load_epoch(Path(config.calibration), geometry.device)
        check_fits(epoch, codec, geometry, config)
    except ConfigError as error:
        raise SystemExit(f"sglang_mosaic: --mosaic-calibration: {error}") from error
    return epoch


def check_fits(epoch: PlanesEpoch, codec: Codec, geometry: Geometry, config: MosaicConfig) -> None:
    """
    Raises:
        ConfigError: the epoch is for another cache.
    """
    basis = epoch.layers[0].basis
    found = len(epoch.layers), *basis.k_basis.shape[:2], basis.v_basis.shape[1], epoch.page_size
    expected = geometry.layers, geometry.kv_heads, geometry.k_dim, geometry.v_dim, PAGE_SIZE
    if found != expected:
        raise ConfigError(
            f"{config.calibration} is for (layers, KV heads, K and V dimensions, page size) = {found}, but this model "
            f"has {expected}; calibrate this model, on as many ranks."
        )
    if epoch.frame_bytes > codec.frame_bytes:
        raise ConfigError(
            f"{config.calibration} needs {epoch.frame_bytes} bytes a page, but --mosaic-ratio {config.ratio} gives "
            f"{codec.frame_bytes}; calibrate with this ratio, or lower the ratio."
        )


def save_calibration(config: MosaicConfig, epoch: PlanesEpoch) -> None:
    """Write an epoch to --mosaic-save-calibration, if that is given. A server does not stop for a full disk."""
    if config.save_calibration is None:
        return
    try:
        save_epoch(epoch, Path(config.save_calibration))
    except OSError as error:
        logger.error("sglang_mosaic: --mosaic-save-calibration %s was not written: %s", config.save_calibration, error)
    else:
        logger.info("sglang_mosaic: calibration %s written to %s", epoch.hash, config.save_calibration)
