"""What can go wrong while the default model is prepared."""

from __future__ import annotations


class ModelDownloadError(RuntimeError):
    """The model's package could not be had, or is not the one this project was tested with.

    Attributes:
        file: name of the file that was wanted.
        expected: its sha256, hexadecimal.
        found: the sha256 found, or None when there was no file at all.
    """

    def __init__(self, file: str, expected: str, found: str | None, advice: str):
        self.file, self.expected, self.found = file, expected, found
        super().__init__(f"{file}: expected sha256 {expected}, found {found or 'no file'}. {advice}")


class ModelConversionError(RuntimeError):
    """The downloaded weights could not be turned into a checkpoint that computes finite logits."""
