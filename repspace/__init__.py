"""Regularization, calibration and robustness, seen from the representation space."""

__version__ = "0.1.0"
