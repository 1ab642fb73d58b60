"""Errors and warnings that conelens raises on purpose; each message says what was given, what is wanted and how to fix it."""

from __future__ import annotations


class ConelensError(Exception):
    """Base of every error that conelens raises on purpose."""


class ArgumentError(ConelensError, ValueError):
    """An argument has a wrong shape, dtype, device or value."""


class UnsupportedOperatorError(ConelensError):
    """The network uses an operator that has no exact rule here, or needs a stated policy."""


class TraceError(ConelensError):
    """The recorded graph does not reproduce the model."""


class LayerError(ConelensError, LookupError):
    """A layer name is unknown, or the layer cannot be used for what was asked."""


class BackendError(ConelensError, RuntimeError):
    """A backend was asked for that cannot run here, or a reference ran where kernels were required."""


class DataError(ConelensError):
    """An image or a data set cannot be read."""


class CheckpointError(ConelensError):
    """A weight file cannot be read safely or does not fit the model."""


class DeadUnitWarning(UserWarning):
    """A unit has no positive activity, so that its projection is zero."""
