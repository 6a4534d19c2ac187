"""BatchNorm: one map with the layer before it, given new statistics, protected in passes."""

from ekfac_rs.batchnorm.deviations import Merging, deviations, merges_in_the_core
from ekfac_rs.batchnorm.merging import (
    Anchor,
    is_exported,
    merge_batchnorm,
    merged_weights,
    raw_weights,
)
from ekfac_rs.batchnorm.moments import Normalising, NormalisingCall, moments_of, moments_of_all
from ekfac_rs.batchnorm.putting_back import WEIGHTS, reparameterize, weight_norms
from ekfac_rs.batchnorm.statistics import (
    as_found,
    device_of,
    frozen_batchnorms,
    use_batch_statistics,
)

__all__ = [
    "WEIGHTS",
    "Anchor",
    "Merging",
    "Normalising",
    "NormalisingCall",
    "as_found",
    "deviations",
    "device_of",
    "frozen_batchnorms",
    "is_exported",
    "merge_batchnorm",
    "merged_weights",
    "merges_in_the_core",
    "moments_of",
    "moments_of_all",
    "raw_weights",
    "reparameterize",
    "use_batch_statistics",
    "weight_norms",
]
