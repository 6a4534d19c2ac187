"""BatchNorm: one map with the layer before it, given new statistics, protected in passes."""

from ekfac_rs.batchnorm.merging import (
    Anchor,
    is_exported,
    merge_batchnorm,
    merged_weights,
    raw_weights,
)
from ekfac_rs.batchnorm.putting_back import WEIGHTS, reparameterize, weight_norms
from ekfac_rs.batchnorm.statistics import (
    as_found,
    device_of,
    frozen_batchnorms,
    moments_of,
    use_batch_statistics,
)

__all__ = [
    "WEIGHTS",
    "Anchor",
    "as_found",
    "device_of",
    "frozen_batchnorms",
    "is_exported",
    "merge_batchnorm",
    "merged_weights",
    "moments_of",
    "raw_weights",
    "reparameterize",
    "use_batch_statistics",
    "weight_norms",
]
