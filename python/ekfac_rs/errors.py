"""Every exception ekfac_rs raises, under one base class.

Each also derives from the built-in exception its users would expect, so
``except ValueError`` keeps working. Messages name the layer or argument, what
was expected and what came.
"""

__all__ = [
    "BatchNormError",
    "CudaError",
    "DeviceError",
    "DistributedError",
    "DtypeError",
    "EkfacError",
    "EmptyLoaderError",
    "FileFormatError",
    "IncompatibleError",
    "InternalError",
    "LabelError",
    "MissingPackageError",
    "ModelChangedError",
    "NonFiniteError",
    "NumericalError",
    "OptionError",
    "OutOfMemoryError",
    "ShapeError",
    "UnknownLayerError",
    "UnsupportedLayerError",
    "UnsupportedLossError",
]


class EkfacError(Exception):
    """Base class of every error raised by ekfac_rs."""


class OptionError(EkfacError, ValueError):
    """An argument has a value that is not among the allowed ones."""


class UnknownLayerError(OptionError, KeyError):
    """There is no layer of this name."""

    __str__ = Exception.__str__  # KeyError's would show the message's repr


class ShapeError(EkfacError, ValueError):
    """A tensor has a shape that does not fit."""


class DtypeError(EkfacError, TypeError):
    """A tensor has a dtype that is not supported here."""


class DeviceError(EkfacError, ValueError):
    """A tensor lives on another device than expected, or on an unsupported one."""


class NonFiniteError(EkfacError, ValueError):
    """A tensor contains NaN or infinity."""


class NumericalError(EkfacError, ArithmeticError):
    """A decomposition or an iteration failed on finite input."""


class InternalError(EkfacError, RuntimeError):
    """A fault of ekfac_rs itself, never of the data: please report it."""


class CudaError(EkfacError, RuntimeError):
    """The CUDA driver or a library is missing, too old or failed, or cannot do what was asked."""


class OutOfMemoryError(CudaError, MemoryError):
    """A device has no room for what was asked."""


class LabelError(EkfacError, ValueError):
    """Targets do not fit the model's output or the loss."""


class EmptyLoaderError(EkfacError, ValueError):
    """A loader yielded no examples."""


class UnsupportedLayerError(EkfacError, TypeError):
    """A layer, or the way it is used, has no curvature block."""


class UnsupportedLossError(EkfacError, ValueError):
    """The loss is not one whose score function is known."""


class BatchNormError(EkfacError, ValueError):
    """A BatchNorm layer cannot be used as asked."""


class ModelChangedError(EkfacError, RuntimeError):
    """The model is not, or no longer, the one this object was made for."""


class IncompatibleError(EkfacError, ValueError):
    """Two objects that were to be combined describe different things."""


class DistributedError(EkfacError, RuntimeError):
    """Another process failed, is gone, or is not where this one is."""


class MissingPackageError(EkfacError, ImportError):
    """Another library is not installed that this part of ekfac_rs works with."""


class FileFormatError(EkfacError, OSError):
    """A file is truncated, corrupted or not one of ours."""
