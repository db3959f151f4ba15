"""What a finished checkpoint directory must hold: written last, read first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sglang_mosaic.embedded_model import source
from sglang_mosaic.embedded_model.convert import REVISION

NAME = "mosaic_manifest.json"


def write(directory: Path, *, quiet: bool) -> None:
    """Record the source, the converter's revision and every file's size (bytes) and sha256 in the directory."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": source.hash_file(path, quiet=quiet)}
        for path in sorted(directory.iterdir())
        if path.name != NAME
    }
    (directory / NAME).write_text(json.dumps({**_identity(), "files": files}, indent=1) + "\n")


def problem(directory: Path, *, full: bool, quiet: bool) -> str | None:
    """Why the directory is not the wanted checkpoint, or None when it is.

    Compares sizes only (well under a millisecond); with `full`, hashes too (0.3 s). Changes nothing.
    """
    try:
        manifest = json.loads((directory / NAME).read_text())
        files = dict(manifest.pop("files"))
        if manifest != _identity():
            return "it was built from another source or by another converter"
        for name, facts in files.items():
            path = directory / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != facts["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {facts['bytes']}"
            if full and source.hash_file(path, quiet=quiet) != facts["sha256"]:
                return f"{name} has another sha256 than when it was written"
    except FileNotFoundError:
        return "it has no manifest"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest is unreadable ({error})"
    return None


def _identity() -> dict[str, Any]:
    return {
        "package": f"{source.PACKAGE}=={source.VERSION}",
        "source_file": source.GGUF,
        "source_sha256": source.GGUF_SHA256,
        "converter_revision": REVISION,
    }
