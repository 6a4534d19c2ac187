"""BatchNorm: merged into the weights before it, put back, and protected during passes."""

from ekfac_rs.batchnorm.merging import (
    Anchor,
    is_merged,
    merge_batchnorm,
    merged_weights,
    raw_weights,
)
from ekfac_rs.batchnorm.putting_back import reparameterize
from ekfac_rs.batchnorm.statistics import as_found, device_of, first_input, use_batch_statistics

__all__ = [
    "Anchor",
    "as_found",
    "device_of",
    "first_input",
    "is_merged",
    "merge_batchnorm",
    "merged_weights",
    "raw_weights",
    "reparameterize",
    "use_batch_statistics",
]
