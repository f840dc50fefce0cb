"""Regularization, calibration and robustness, seen from the representation space."""

__version__ = "0.1.0"

_AUDITING = ("Audit", "Probe", "audit", "compare")   # from `repspace.auditing`, which imports torch: once they are asked for


def __getattr__(name):
    if name not in _AUDITING: raise AttributeError(f"module 'repspace' has no attribute {name!r}")
    from . import auditing
    return getattr(auditing, name)


def __dir__(): return [*globals(), *_AUDITING]
