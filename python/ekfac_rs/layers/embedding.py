"""Embeddings: affine maps of one-hot inputs that are never made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ekfac_rs import _core
from ekfac_rs.layers.base import AffineCall, AffineLayer, Function, Units, flat_units

_NOT_PLAIN = ("max_norm", "scale_grad_by_freq", "sparse")


@dataclass(frozen=True)
class Tokens(Units):
    """Units that are one-hot: ``values``, ``[N, 1]`` or ``[N, T, 1]``, say which of ``count``.

    The unit of the padding token, if there is one, is zero: its embedding gets no gradient.
    """

    count: int
    padding: int | None

    def to(self, dtype: torch.dtype) -> Self:
        return self

    def accumulate(
        self,
        out: Sequence[Tensor],
        approximation: str,
        append_one: bool,
        precision: str,
        note: _core.Note | None,
    ) -> list[int]:
        """Add N times the diagonal of the input factor of stratum k to ``out[k]``, by counting.

        With ``n_v`` the occurrences of token v in the mini-batch and ``q_v`` the sum over examples
        of the squares of those in an example, the diagonals of the strata's sums of squares are
        ``n`` (total), ``q / T**2`` (totals of examples), ``n - n**2 / U`` (within the batch),
        ``n - q / T`` (within examples), ``q / T - n**2 / U`` (between examples) and ``n**2 / U``
        (mean).
        """
        N, U = len(self), self.values.numel()
        T = U // N
        pairs, occurrences = torch.unique(self._pairs(), return_counts=True)
        occurrences = occurrences.double()
        n, q = (self._summed(pairs, x) for x in (occurrences, occurrences.square()))
        strata = {
            "total": (n, U),
            "example-totals": (q / T, N),
            "within-batch": (n - n.square() / U, U - 1),
            "within-example": (n - q / T, N * (T - 1)),
            "between-examples": (q / T - n.square() / U, N - 1),
            "mean": (n.square() / U, 1),
        }
        degrees_of_freedom = []
        for a, name in zip(out, _core.strata()[approximation], strict=True):
            sums, dof = strata[name]
            a.add_(sums.clamp_min(0.0) / T)
            degrees_of_freedom.append(dof)
        return degrees_of_freedom

    def gradient(self, g: Tensor) -> Tensor:
        """Sum over units of the gradients of each token, shape (D, count)."""
        g = g.reshape(-1, g.shape[-1])
        sums = g.new_zeros(self.count, g.shape[-1]).index_add_(0, self.values.flatten(), g)
        if self.padding is not None:
            sums[self.padding] = 0.0
        return sums.T

    def squared_gradients(self, g: Tensor) -> Tensor:
        """Sum over examples of the squares of their gradients, shape (D, count)."""
        pairs, places = torch.unique(self._pairs(), return_inverse=True)
        g = g.reshape(-1, g.shape[-1])
        gradients = g.new_zeros(len(pairs), g.shape[-1]).index_add_(0, places, g)
        return self._summed(pairs, gradients.square_()).T

    def _pairs(self) -> Tensor:
        """Return the number that tells example and token of every unit, ``[U]``."""
        examples = torch.arange(len(self), device=self.values.device)[:, None]
        return (examples * self.count + self.values.reshape(len(self), -1)).flatten()

    def _summed(self, pairs: Tensor, values: Tensor) -> Tensor:
        """Sum over examples of a value for each pair, ``[count, ...]``."""
        sums = values.new_zeros(self.count, *values.shape[1:])
        sums.index_add_(0, pairs % self.count, values)
        if self.padding is not None:
            sums[self.padding] = 0.0
        return sums


class EmbeddingLayer(AffineLayer):
    """An Embedding: ``h = W e_v`` for token v, with ``W`` of shape (embedding_dim, num_embeddings).

    ``W`` is the transpose of the module's weight. Of the input factors only the diagonals are
    kept, ``[num_embeddings]``: products between the gradients of different tokens are neglected
    (see `ekfac_rs.ColumnwiseSum`). A BatchNorm after it is a layer of its own: a shift by channel
    would have to be a column beside those of the tokens, which it meets in every product.
    """

    noun = "an Embedding"
    modules = (nn.Embedding,)
    functions: ClassVar[Mapping[Function, tuple[str, ...]]] = {
        F.embedding: (
            *("input", "weight", "padding_idx", "max_norm", "norm_type"),
            *("scale_grad_by_freq", "sparse"),
        )
    }

    @classmethod
    def why_unsupported(cls, module: nn.Module) -> str | None:
        return _why_not_plain(vars(module)) or super().why_unsupported(module)

    @classmethod
    def why_refused(cls, call: AffineCall) -> str | None:
        return _why_not_plain(call.arguments) or super().why_refused(call)

    def in_words(self, coordinates: str) -> str:
        D, K = self.shape(coordinates)
        return f"Kronecker {D} x {K}, each token for itself"

    def as_matrix(self, stored: Tensor) -> Tensor:
        return stored.T

    def as_stored(self, weight: Tensor) -> Tensor:
        return weight.T

    def factor_shapes(self, coordinates: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        D, K = self.shape(coordinates)
        return (K,), (D, D)

    def units(self, call: AffineCall) -> Units:
        count, padding = len(call.arguments["weight"]), call.arguments.get("padding_idx")
        return Tokens(
            flat_units(call.input[..., None]), count, None if padding is None else padding % count
        )

    def gradients(self, g: Tensor) -> Tensor:
        return flat_units(g)

    def gradient(self, units: Units, g: Tensor) -> Tensor:
        assert isinstance(units, Tokens)
        return units.gradient(g)

    def squared_gradients(self, units: Units, g: Tensor) -> Tensor:
        assert isinstance(units, Tokens)
        return units.squared_gradients(g)


def _why_not_plain(options: Mapping[str, Any]) -> str | None:
    for name in _NOT_PLAIN:
        if options.get(name):
            return f"expected a plain Embedding, got {name}={options[name]!r}"
    return None
