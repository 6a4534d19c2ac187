"""Where a layer is in a training step, and how its merged weights depend on its parameters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ekfac_rs._tensors import accumulation_dtype
from ekfac_rs.layers import AffineLayer


@dataclass(frozen=True)
class Situation:
    """The statistics that a layer's BatchNorm uses, and how they move with the layer's weights.

    Attributes
    ----------
    mean, variance : Tensor of shape (D,)
    input_mean : Tensor of shape (groups, K), optional
        Mean of the layer's inputs: the slope of ``mean`` in each row of the weights. None where
        statistics are constants.
    variance_slope : Tensor of shape (D, K), optional
        The slope of each output's variance in its row.
    """

    mean: Tensor
    variance: Tensor
    input_mean: Tensor | None = None
    variance_slope: Tensor | None = None

    def merged_weight(self, layer: AffineLayer) -> Tensor:
        """Return the merged weights, differentiable, the statistics following to first order."""
        if self.input_mean is None or self.variance_slope is None:
            return layer.merged_weight(self.mean, self.variance)
        weight, bias = layer.weight(), layer.bias()
        moved = weight - weight.detach()
        by_group = layer.by_group(moved)
        mean = self.mean + (by_group @ self.input_mean[..., None]).flatten()
        if bias is not None:
            mean = mean + (bias - bias.detach())
        variance = self.variance + (moved * self.variance_slope).sum(1)
        return layer.merged_weight(mean, variance)


@dataclass(frozen=True)
class Column:
    """A parameter as columns of a matrix with a row for each output."""

    parameter: nn.Parameter
    as_matrix: Callable[[Tensor], Tensor]
    as_stored: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class View:
    """How a layer's merged weights depend on its parameters.

    Attributes
    ----------
    layer : AffineLayer
    situation : Situation or None
        None where there is no BatchNorm to merge.
    columns : list of Column
        Trainable parameters that are columns of one matrix ``[D, columns]``. Its move ``V`` moves
        the merged weights by ``diag(gain) V to_merged``, for each group; how the variances follow
        is left out.
    to_merged : Tensor of shape (groups, columns, K), optional
        None for the identity.
    gain : Tensor of shape (D,), optional
        None for ones.
    gamma, beta : Parameter, optional
        Those of a BatchNorm whose scale the layer absorbs, where trainable.
    """

    layer: AffineLayer
    situation: Situation | None
    columns: list[Column]
    to_merged: Tensor | None = None
    gain: Tensor | None = None
    gamma: nn.Parameter | None = None
    beta: nn.Parameter | None = None

    @classmethod
    def of(cls, layer: AffineLayer, situation: Situation | None) -> "View":
        """Return the view of a layer's merged weights in a situation, or of its raw ones."""
        if situation is None:
            columns = _columns_of(layer, with_bias=True)
            to_merged = (
                None if layer.bias() is None else _to_merged(layer, columns, None, layer.like)
            )
            return cls(layer, None, columns, to_merged)
        if not layer.absorbs_scale:
            return cls._of_batchnorm(layer, situation)
        gain = layer.gain(situation.variance).detach()
        # Batch statistics take the bias out.
        columns = _columns_of(layer, with_bias=situation.input_mean is None)
        return cls(
            layer,
            situation,
            columns,
            to_merged=_to_merged(layer, columns, situation.input_mean, gain),
            gain=gain,
            gamma=_trainable(layer.batchnorm.weight),
            beta=_trainable(layer.batchnorm.bias),
        )

    @classmethod
    def _of_batchnorm(cls, layer: AffineLayer, situation: Situation) -> "View":
        """Return the view of a BatchNorm that is a layer of its own."""
        inverse = torch.rsqrt(situation.variance + layer.batchnorm.eps)
        kept: dict[nn.Parameter, Tensor] = {}
        if (gamma := _trainable(layer.batchnorm.weight)) is not None:
            kept[gamma] = torch.stack([inverse, -situation.mean * inverse], 1)
        if (beta := _trainable(layer.batchnorm.bias)) is not None:
            kept[beta] = torch.stack([torch.zeros_like(inverse), torch.ones_like(inverse)], 1)
        to_merged = torch.stack(list(kept.values()), 1) if kept else None
        return cls(layer, situation, [as_column(p) for p in kept], to_merged=to_merged)

    def weight(self) -> Tensor:
        """Return the merged weights, differentiable to first order."""
        if self.situation is None:
            weight = self.layer.raw_weight()
            return weight.to(accumulation_dtype(weight.dtype))
        return self.situation.merged_weight(self.layer)

    def by_gamma(self) -> Tensor:
        """Return the derivative of the merged weights in gamma, row by row: shape (D, K)."""
        assert self.situation is not None
        mean, variance = self.situation.mean, self.situation.variance
        bias = self.layer.bias()
        shift = -mean if bias is None else bias - mean
        rows = torch.cat([self.layer.weight(), shift[:, None]], 1)
        return rows * torch.rsqrt(variance + self.layer.batchnorm.eps)[:, None]

    def by_variance(self) -> Tensor:
        """Return that in the statistics' variance."""
        assert self.situation is not None
        share = -0.5 / (self.situation.variance + self.layer.batchnorm.eps)
        gamma = self.layer.batchnorm.weight
        rows = self.by_gamma() if gamma is None else gamma[:, None] * self.by_gamma()
        moved: Tensor = share[:, None] * rows
        return moved


def _trainable(parameter: nn.Parameter | None) -> nn.Parameter | None:
    return parameter if parameter is not None and parameter.requires_grad else None


def as_column(parameter: nn.Parameter) -> Column:
    """Return a parameter with a number for each output as one column."""
    return Column(parameter, lambda p: p.reshape(-1, 1), lambda m: m.reshape(parameter.shape))


def _columns_of(layer: AffineLayer, with_bias: bool) -> list[Column]:
    columns = []
    if (weight := _trainable(layer.module.weight)) is not None:
        columns.append(Column(weight, layer.as_matrix, layer.as_stored))
    if with_bias and (bias := _trainable(getattr(layer.module, "bias", None))) is not None:
        columns.append(as_column(bias))
    return columns


def _to_merged(
    layer: AffineLayer, columns: Sequence[Column], input_mean: Tensor | None, like: Tensor
) -> Tensor | None:
    """Return the rows of ``[[I, -m], [0, 1]]`` for each group that belong to trained columns."""
    K = layer.weight().shape[1]
    if len(columns) != 1:
        return None
    whole = torch.eye(K + 1, dtype=like.dtype, device=like.device).repeat(layer.groups, 1, 1)
    if input_mean is not None:
        whole[:, :K, K] = -input_mean
    return whole[:, :K] if columns[0].parameter is layer.module.weight else whole[:, K:]
