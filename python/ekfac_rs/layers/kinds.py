"""Every kind of layer: a kind whose file is imported here is known everywhere."""

from ekfac_rs.layers import convolution, embedding, linear, normalisation
from ekfac_rs.layers.base import argument_names, kind_of, kinds_in_words

__all__ = [
    "argument_names",
    "convolution",
    "embedding",
    "kind_of",
    "kinds_in_words",
    "linear",
    "normalisation",
]
