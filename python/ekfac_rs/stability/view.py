"""Where a layer is in a training step, and how its merged weights move with its parameters."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ekfac_rs._lanczos import start_vector
from ekfac_rs._tensors import accumulation_dtype
from ekfac_rs.layers import AffineLayer

Moves = Mapping[nn.Parameter, Tensor]


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
        The slope of each output's variance in its row; there with ``input_mean``.
    """

    mean: Tensor
    variance: Tensor
    input_mean: Tensor | None = None
    variance_slope: Tensor | None = None

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "Situation":
        """Return what a function makes of each."""
        slopes = self.input_mean, self.variance_slope
        input_mean, variance_slope = (None if x is None else function(x) for x in slopes)
        return Situation(function(self.mean), function(self.variance), input_mean, variance_slope)


class View:
    """The merged weights of a layer, to first order in its trainable parameters.

    With batch statistics a move ``V`` of the weights moves the merged ones by
    ``[s V, -s V m] + by_variance <slope, V>`` in each row, with the gain ``s``, the mean ``m`` of
    the inputs and the slope of the variance; a bias moves nothing. With constant statistics it is
    ``[s V, 0]``, and a bias moves the shift by ``s`` (method: stable step).

    Parameters
    ----------
    layer : AffineLayer
    situation : Situation or None
        None for the layer's raw weights.
    with_gradients : bool
        Of a step that is about to be made: parameters without a gradient stay as they are in it.

    Attributes
    ----------
    weight, bias, gamma, beta : Parameter or None
        Those that are trainable and move anything.
    gain : Tensor of shape (D,), or None
        None for ones.
    input_mean, variance_slope : Tensor or None
        The situation's.
    """

    def __init__(
        self, layer: AffineLayer, situation: Situation | None, *, with_gradients: bool = False
    ) -> None:
        self.layer = layer
        moving = _with_gradient if with_gradients else _trainable
        self._situation = situation
        self._dtype = accumulation_dtype(layer.like.dtype)
        self.input_mean = self.variance_slope = self.gain = None
        self.gamma = self.beta = None
        module = layer.module
        own_weight = situation is None or layer.absorbs_scale
        self.weight = moving(module.weight) if own_weight else None
        self.bias = moving(getattr(module, "bias", None)) if own_weight else None
        if situation is not None:
            self.gain = layer.gain(situation.variance).detach().to(self._dtype)
            self.gamma = moving(layer.batchnorm.weight)
            self.beta = moving(layer.batchnorm.bias)
            if situation.input_mean is not None and self.weight is not None:
                self.input_mean, self.variance_slope = (
                    situation.input_mean,
                    situation.variance_slope,
                )
                self.bias = None  # batch statistics take it out

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All of them that there are."""
        every = (self.weight, self.bias, self.gamma, self.beta)
        return [parameter for parameter in every if parameter is not None]

    @cached_property
    def by_gamma(self) -> Tensor:
        """Derivative of the merged weights in gamma, row by row: shape (D, K)."""
        assert self._situation is not None
        bias, mean = self.layer.bias(), self._situation.mean
        shift = -mean if bias is None else bias.detach() - mean
        rows = torch.cat([self.layer.weight().detach(), shift[:, None]], 1)
        return rows.to(self._dtype) * self._inverse_deviation[:, None]

    @cached_property
    def by_variance(self) -> Tensor:
        """That in the variance of the statistics."""
        share = -0.5 * self._inverse_deviation.square()
        gamma = self.layer.batchnorm.weight
        scale = share if gamma is None else share * gamma.detach()
        return scale[:, None] * self.by_gamma

    @property
    def _inverse_deviation(self) -> Tensor:
        assert self._situation is not None
        inverse: Tensor = torch.rsqrt(self._situation.variance + self.layer.batchnorm.eps)
        return inverse.to(self._dtype)

    def pushed(self, moves: Moves) -> Tensor:
        """Return the move of the merged weights, shape (D, K), under moves of all parameters."""
        moved = torch.zeros(self._shape, dtype=self._dtype, device=self.layer.like.device)
        body, shift = self._parts_of(moved)
        if self.weight is not None:
            V = self.layer.as_matrix(moves[self.weight]).to(self._dtype)
            body += V if self.gain is None else self.gain[:, None] * V
            if self.input_mean is not None:
                along = (self.layer.by_group(V) @ self.input_mean[..., None]).flatten()
                shift -= along if self.gain is None else self.gain * along
            if self.variance_slope is not None:
                moved += (self.variance_slope * V).sum(1, keepdim=True) * self.by_variance
        if self.bias is not None:
            b = moves[self.bias].reshape(-1).to(self._dtype)
            shift += b if self.gain is None else self.gain * b
        if self.gamma is not None:
            moved += moves[self.gamma].to(self._dtype)[:, None] * self.by_gamma
        if self.beta is not None:
            shift += moves[self.beta]
        return moved

    def pulled(self, U: Tensor) -> dict[nn.Parameter, Tensor]:
        """Return gradients of the parameters, from one of the merged weights: the adjoint."""
        gradients: dict[nn.Parameter, Tensor] = {}
        body, shift = self._parts_of(U)
        if self.weight is not None:
            V = body
            if self.input_mean is not None:
                rows = self.layer.by_group(shift[:, None]) * self.input_mean[:, None]
                V = V - rows.flatten(0, 1)
            V = V if self.gain is None else self.gain[:, None] * V
            if self.variance_slope is not None:
                V = V + (self.by_variance * U).sum(1, keepdim=True) * self.variance_slope
            gradients[self.weight] = self.layer.as_stored(V)
        if self.bias is not None:
            b = shift if self.gain is None else self.gain * shift
            gradients[self.bias] = b.reshape(self.bias.shape)
        if self.gamma is not None:
            gradients[self.gamma] = (self.by_gamma * U).sum(1)
        if self.beta is not None:
            gradients[self.beta] = shift.clone()
        return gradients

    @property
    def _shape(self) -> tuple[int, int]:
        return self.layer.shape("raw" if self._situation is None else "merged")

    def _parts_of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """View weights as those of the inputs and, empty where there is none, the shift."""
        K = self.layer.weight().shape[1]
        body, rest = weight[:, :K], weight[:, K:]
        return body, rest[:, 0] if rest.shape[1] else rest.flatten()

    @cached_property
    def layout(self) -> "Layout":
        """All parameters in one vector; where there is one at the least."""
        return Layout(self.parameters, self._dtype)


class Layout:
    """Parameters, one after another in one vector.

    Parameters
    ----------
    parameters : sequence of Parameter
        At least one; the vector is on the first one's device.
    dtype : torch.dtype, optional
        Of the vector. Default: that of sums over the first one.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], dtype: torch.dtype | None = None
    ) -> None:
        self._parameters = parameters
        self._sizes = [p.numel() for p in parameters]
        dtype = dtype or accumulation_dtype(parameters[0].dtype)
        self._like = torch.empty(0, dtype=dtype, device=parameters[0].device)

    def flat(self, moves: Moves) -> Tensor:
        """Lay the parameters' tensors out in one vector."""
        return torch.cat([moves[p].reshape(-1).to(self._like) for p in self._parameters])

    def unflattened(self, v: Tensor) -> dict[nn.Parameter, Tensor]:
        """Return the parts of a vector that belong to each parameter."""
        parts = torch.split(v, self._sizes)
        return {
            p: part.view(p.shape).to(p.device)
            for p, part in zip(self._parameters, parts, strict=True)
        }

    def start(self, near: Tensor | None = None) -> Tensor:
        """Return a direction to begin with, as `start_vector`."""
        return start_vector(sum(self._sizes), self._like, near)


def _trainable(parameter: nn.Parameter | None) -> nn.Parameter | None:
    return parameter if parameter is not None and parameter.requires_grad else None


def _with_gradient(parameter: nn.Parameter | None) -> nn.Parameter | None:
    trainable = _trainable(parameter)
    return None if trainable is None or trainable.grad is None else trainable
