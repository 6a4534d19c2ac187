"""Extended Kronecker-factored curvature for networks with BatchNorm."""

import torch as _torch  # noqa: F401  first: it makes the CUDA libraries visible to the Rust core

from ekfac_rs import distributed, errors, likelihood, metrics, scales
from ekfac_rs._core import build_info, num_threads, set_num_threads
from ekfac_rs._cuda import cuda_info
from ekfac_rs.batchnorm import (
    Anchor,
    merge_batchnorm,
    merged_weights,
    raw_weights,
    reparameterize,
    weight_norms,
)
from ekfac_rs.curvature import (
    ColumnwiseSum,
    Curvature,
    DiagonalBlock,
    EigenbasisSum,
    KroneckerSum,
    PassSettings,
    ThinKroneckerSum,
    compress_curvatures,
    estimate_curvature,
)
from ekfac_rs.description import Description, describe
from ekfac_rs.errors import EkfacError
from ekfac_rs.learning import ContinualLearner
from ekfac_rs.metrics import AccuracyMatrix
from ekfac_rs.penalty import QuadraticPenalty
from ekfac_rs.stability import StabilityWarning

__version__: str = build_info()["version"]

__all__ = [
    "AccuracyMatrix",
    "Anchor",
    "ColumnwiseSum",
    "ContinualLearner",
    "Curvature",
    "Description",
    "DiagonalBlock",
    "EigenbasisSum",
    "EkfacError",
    "KroneckerSum",
    "PassSettings",
    "QuadraticPenalty",
    "StabilityWarning",
    "ThinKroneckerSum",
    "__version__",
    "build_info",
    "compress_curvatures",
    "cuda_info",
    "describe",
    "distributed",
    "errors",
    "estimate_curvature",
    "likelihood",
    "merge_batchnorm",
    "merged_weights",
    "metrics",
    "num_threads",
    "raw_weights",
    "reparameterize",
    "scales",
    "set_num_threads",
    "weight_norms",
]
