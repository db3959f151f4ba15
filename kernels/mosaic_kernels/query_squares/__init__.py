"""What a calibration learns from queries: sums of squares of their channels."""
