"""The quadratic penalty around an anchor, as an autograd function over the Rust product."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial, reduce
from operator import add
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ekfac_rs._checks import (
    is_finite,
    require_choice,
    require_finite,
    require_like,
    require_nonnegative,
    require_share,
)
from ekfac_rs._modes import bare_model, submodule, without_autocast
from ekfac_rs._operators import (
    InnerProducts,
    LayerProduct,
    Operator,
    operator_of,
    write_products,
)
from ekfac_rs._ranks import Ranks
from ekfac_rs._tensors import accumulation_dtype, put_back
from ekfac_rs.batchnorm import (
    Anchor,
    Merging,
    Normalising,
    NormalisingCall,
    deviations,
    merges_in_the_core,
    moments_of,
    moments_of_all,
)
from ekfac_rs.batchnorm.statistics import (
    hook_calls,
    in_own_pass,
    input_of,
    kept_statistics,
    require_over,
)
from ekfac_rs.curvature import (
    Block,
    Curvature,
    DiagonalBlock,
    KroneckerSum,
    Signature,
)
from ekfac_rs.curvature.curvature import require_summable
from ekfac_rs.errors import (
    IncompatibleError,
    ModelChangedError,
    NonFiniteError,
    OptionError,
    ShapeError,
    UnknownLayerError,
)
from ekfac_rs.layers import COORDINATES, AffineLayer, bind_layers, find_layers
from ekfac_rs.layers.dataflow import removed_afterwards
from ekfac_rs.stability import (
    Hessian,
    Situation,
    StabilityWarning,
    StableStep,
    StableSteps,
    Together,
    View,
    reach_of,
    top_eigenvalue_of_parameters,
)


class QuadraticPenalty:
    """Quadratic penalty on a model's weights around an anchor.

    ``scale / 2 * sum_l <D_l, sum_t H_tl D_l> + damping / 2 * sum_l |D_l|**2`` where ``H_tl`` is
    the block of layer l in curvature t and ``D_l`` the layer's current weights less the anchor, a
    matrix of shape (D, K). In merged coordinates the current weights are the merged view: with the
    statistics of the **current mini-batch** where the BatchNorm is in train mode (gradients flow
    through them), and with its running statistics in eval mode (method: penalty). The current
    mini-batch is that of the model's last forward pass with gradients: neither a pass under
    ``no_grad`` counts, nor one of a copy of the model, nor one that is made again during a
    backward pass (activation checkpointing).

    The model can be copied and saved as a whole while a penalty listens to it; the copies have no
    penalty.

    Parameters
    ----------
    model : torch.nn.Module
    curvatures : Curvature or sequence of Curvature
        One for each earlier task, all in the same coordinates, or their sum from
        `compress_curvatures`; may be empty, which leaves the damping: L2 to the anchor. The last
        must have been taken at the anchor.
    anchor : mapping of str to Tensor
        Layer name to weights of shape (D, K), as from `merged_weights`. Copied.
    damping : float
        Weight decay centred on the anchor, not multiplied by ``scale``.
    scale : float
        Multiplies the curvatures' sum.
    coordinates : str, optional
        "merged" or "raw": needed only without curvatures. Default: theirs, else "merged".
    dropped : float
        0 multiplies by the curvatures as they are. Above 0, a share: of each factor of a Kronecker
        product the eigenvectors of its largest eigenvalues are kept, the fewest that have all but
        this share of its trace, and the mean of the others on the diagonal. What penalty and
        gradients are of then stays positive semi-definite, its trace what it was; products take a
        fraction of the time (`describe` tells which, and how far it is from the curvatures).
        Layers with groups, Embeddings, diagonals and corrected eigenvalues stay exact.
    precision : {"auto", "ieee", "tf32"}
        To what the operands of products with the curvatures in float32 are rounded on a GPU. "auto"
        is what torch does with the layer's own products or convolutions, as in
        `estimate_curvature`. On the CPU nothing is rounded.
    process_group : torch.distributed.ProcessGroup, optional
        Processes that train the model together, each on mini-batches of its own, and average their
        gradients, as DistributedDataParallel does: the penalty is then counted once. Default: that
        of the model's DistributedDataParallel, or else this process alone. With
        `torch.nn.SyncBatchNorm` in train mode the penalty is that of the global mini-batch, the
        same on all ranks. Other BatchNorms have each process's own statistics, and so has its
        penalty; averaged are their gradients. All processes call the penalty and `precondition`
        in step.

    Raises
    ------
    IncompatibleError
        Curvatures in different coordinates or over different layers; an anchor merged with other
        BatchNorms.
    ModelChangedError
        The model is not the curvatures', or the last of them was taken at other weights.
    BatchNormError
        When called: a SyncBatchNorm in train mode is over other processes.
    ShapeError, DtypeError, DeviceError, OptionError, NonFiniteError
        An anchor or curvature does not fit its layer; damping or scale is negative; ``dropped`` is
        no share; ``precision`` is another, or "tf32" for curvatures that are not on a GPU.

    References
    ----------
    Ritter, Botev, Barber, NeurIPS 2018: the tasks' curvatures add, around the latest anchor. Lee,
    Hong, Joo, Kim, CVPR 2020: on merged weights.

    Examples
    --------
    >>> loss = criterion(model(x), y) + penalty()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        curvatures: Curvature | Sequence[Curvature],
        anchor: Mapping[str, Tensor],
        damping: float = 0.0,
        scale: float = 1.0,
        *,
        coordinates: str | None = None,
        dropped: float = 0.0,
        precision: str = "auto",
        process_group: "dist.ProcessGroup | None" = None,
    ) -> None:
        require_nonnegative("damping", damping)
        if dropped != 0.0:
            require_share("dropped", dropped)
        require_choice("precision", precision, _PRECISIONS)
        curvatures = [curvatures] if isinstance(curvatures, Curvature) else list(curvatures)
        self.damping, self.scale = float(damping), scale
        self.dropped = dropped
        self._increase: float | Tensor = 0.0
        self._saw_batches = False
        self.coordinates = _common_coordinates(curvatures, coordinates)
        self._ranks = Ranks.of(model, process_group)
        self._model = model = bare_model(model)
        self._layers = _bind(model, curvatures, anchor, self.coordinates)
        self._anchor = self._checked_anchor(anchor)
        if curvatures:
            self._require_taken_at_anchor(curvatures[-1])
        self._operators = {
            layer.name: operator_of(
                [c[layer.name] for c in curvatures],
                self._anchor[layer.name],
                dropped,
                _precision_of(layer, precision),
            )
            for layer in self._layers
        }
        self._input_moments = _input_moments(curvatures[-1:], self._layers)
        self._top_eigenvalue: float | None = None
        self._stable = StableSteps()
        self._together = Together(model, self._ranks)
        self._own: Curvature | None = None
        self._batches: dict[str, _LastBatch] = {}
        self._handles = []
        for layer in self._layers:
            if self.coordinates == "merged" and layer.batchnorm is not None:
                self._batches[layer.name] = batch = _LastBatch(layer, self._ranks)
                self._handles.append(hook_calls(layer.batchnorm, batch))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the penalty's hooks from the model; it cannot be called in train mode after."""
        with removed_afterwards(self._handles):
            for batch in self._batches.values():
                batch.forget()
        self._handles = []

    def __call__(self) -> Tensor:
        """Value of the penalty at the model's current weights, a differentiable scalar.

        Differentiable once: a backward pass with ``create_graph=True`` raises `OptionError`.

        Raises
        ------
        ModelChangedError
            A layer was replaced; there was no forward pass in train mode with gradients yet; or
            the parameters changed since the last one.
        NonFiniteError
            The current weights are NaN or infinite. On a GPU nothing is looked at, so that nothing
            waits for it, and the value is NaN or infinite, too.
        """
        with without_autocast(self._layers[0].like.device):
            return self._value()

    def _value(self) -> Tensor:
        from_anchor = self._deviations()
        modes = tuple(self._uses_batch(layer) for layer in self._layers)
        # Without gradients nothing tells how statistics move with the weights.
        if torch.is_grad_enabled() and self._stable.is_due(modes):
            self._look(modes)
        operators = [self._operators[layer.name] for layer in self._layers]
        squares = _Squares(from_anchor[0])
        value: Tensor = _Quadratic.apply(operators, self.scale, self.damping, squares, *from_anchor)
        self._increase, self._saw_batches = squares.increase, any(modes)
        if not value.is_cuda and not is_finite(value):
            self._raise_non_finite(from_anchor)
        return value

    @torch.no_grad()
    def predicted_increase(self) -> float | Tensor:
        """How much the earlier tasks' mean losses have grown since the anchor, by the curvatures.

        ``1/2 * sum_l <D_l, sum_t H_tl D_l>``, a sum over tasks, under **running** statistics: those
        of mini-batches add noise, which the consolidated model has none of.

        Returns
        -------
        float or Tensor
            On a GPU a tensor there, which nobody has waited for.
        """
        if not self._saw_batches:
            return self._increase  # the last call's product serves
        squares = _Squares(next(iter(self._anchor.values())))
        with without_autocast(self._layers[0].like.device):
            settled = [D.contiguous() for D in self._deviations(settled=True)]
            operators = [self._operators[layer.name] for layer in self._layers]
            out = [torch.empty_like(D) for D in settled]
            for products in write_products(operators, settled, out, 1.0, 0.0):
                squares.add(products)
        return squares.increase

    @property
    def scale(self) -> float:
        """Multiplies the curvatures' sum; it may change between two calls.

        Raises
        ------
        OptionError
            It is set to something negative or not finite.
        """
        return self._scale

    @scale.setter
    def scale(self, scale: float) -> None:
        require_nonnegative("scale", scale)
        self._scale = float(scale)

    def deviations(self) -> dict[str, Tensor]:
        """Return each layer's current weights less the anchor, of shape (D, K)."""
        names = [layer.name for layer in self._layers]
        return dict(zip(names, self._deviations(), strict=True))

    def top_eigenvalue(self) -> float:
        """Largest eigenvalue of the penalty's Hessian in the weights it lives on."""
        if self._top_eigenvalue is None:
            self._top_eigenvalue = max(op.top_eigenvalue() for op in self._operators.values())
        return self.scale * self._top_eigenvalue + self.damping

    def max_stable_lr(self, momentum: float = 0.0, *, nesterov: bool = False) -> float:
        """Learning rate above which explicit SGD on the penalty alone diverges at the anchor.

        ``2 (1 + momentum) / top``, the bound of gradient descent with heavy-ball momentum on a
        quadratic (Polyak 1964), divided by ``1 + 2 momentum`` for Nesterov's. ``top`` is the top
        eigenvalue of the penalty's Hessian in the model's own parameters: a step of ``W`` moves the
        merged weights by the gain ``gamma / sigma``, once in the gradient and once in the weights.
        Layers are taken one by one, BatchNorms in the mode they are in. In train mode their
        statistics follow the weights
        as on the last curvature's data; with a diagonal one, with eigenvalues or nearest factors
        (see `estimate_curvature`) and with what `compress_curvatures` made, which do
        not know the inputs, and in eval mode they are constants. Infinite for a zero penalty.

        Parameters
        ----------
        momentum : float
        nesterov : bool
            Whether it is Nesterov's.

        Raises
        ------
        NumericalError
            The products overflow: the weights or the Hessian are much too large.
        """
        top = max(self._top_eigenvalue_of_parameters(layer) for layer in self._layers)
        return 2.0 * reach_of(momentum, nesterov) / top if top > 0.0 else float("inf")

    def check_lr(self, lr: float, momentum: float = 0.0, *, nesterov: bool = False) -> bool:
        """Warn with `StabilityWarning` if ``lr`` exceeds `max_stable_lr`; return whether it holds.

        Parameters
        ----------
        lr : float
        momentum : float
        nesterov : bool
        """
        bound = self.max_stable_lr(momentum, nesterov=nesterov)
        if lr <= bound:
            return True
        warnings.warn(
            f"lr {lr:g} exceeds {bound:g}, above which SGD is unstable on this penalty "
            f"({'Nesterov ' if nesterov else ''}momentum {momentum:g})",
            StabilityWarning,
            stacklevel=2,
        )
        return False

    def describe(self) -> dict[str, LayerProduct]:
        """Tell for each layer what a product with its curvatures takes, and how exact it is.

        Takes some time and memory where ``dropped`` is above 0: those of the curvatures again.

        Returns
        -------
        dict of str to LayerProduct
            By layer name: "flops", the floating-point operations of a product with a matrix of
            shape (D, K); "columns", how many truncated roots it goes through; "error", relative
            to the curvatures' sum in Frobenius norm.
        """
        return {layer.name: self._operators[layer.name].describe() for layer in self._layers}

    @torch.no_grad()
    def precondition(
        self,
        lr: float,
        own: Curvature | None = None,
        *,
        loss: Callable[[], Tensor] | None = None,
        momentum: float = 0.0,
        nesterov: bool = False,
        step_lr: float | None = None,
    ) -> None:
        """Make the next step of an optimiser stable on this penalty, whatever its learning rate.

        The gradients of each layer's parameters are multiplied by ``(I + lr K)^-1``, where ``K``
        is one operator of a simple form about as large as the penalty's Hessian in these
        parameters: gains and the mean of the mini-batch included. The step is then linearly
        implicit: directions that earlier tasks hold on to move slowly instead of diverging, and
        the points where the gradient is zero stay the same (method: stable step).

        Call it after ``backward()`` and before the optimiser's step. ``K`` is taken anew from
        time to time, from the mini-batch of the last ``penalty()``, as strong as its power
        iterations find that ``lr`` needs it.

        Parameters
        ----------
        lr : float
            The learning rate of the step to be made, or the highest of a schedule for all of its
            steps alike.
        own : Curvature, optional
            The present task's own, of some mini-batches: ``K`` holds it, too, and the step is
            stable on the new task's loss as far as this knows it. Natural gradient descent
            with a K-FAC, beside what earlier tasks hold on to.
        loss : callable, optional
            Returns the new task's loss of some mini-batch as the model is, a scalar:
            ``lambda: criterion(model(x), y)``, without the penalty. Steps that are stable in every
            layer by itself need not be so in all of them together. With this they are, as far as
            the mini-batch tells: the gradients of all parameters are multiplied by the largest
            number up to 1 that makes them so, by at most twice what it was at the look before.
            Called, under the caller's autocast, when ``K`` is taken anew and where ``lr`` has
            fallen far, for a few products with the loss's Hessian; hooks of parameters see these.
            Random states and the model's buffers stay as they are. What is marked
            ``once_differentiable`` counts as constant there.
        momentum, nesterov : float, bool
            Of the optimiser, for ``loss``, as in `max_stable_lr`.
        step_lr : float, optional
            The learning rate of this step, where ``lr`` is the highest of a schedule: a shorter
            step has to be shortened less. Default: ``lr``.

        Warns
        -----
        StabilityWarning
            Once, where the loss has no second derivative that torch knows, or not a finite one.
            Steps are then stable layer by layer.

        Raises
        ------
        IncompatibleError
            ``own`` is of another kind than the earlier tasks' curvatures, or merged with other
            BatchNorms.
        UnknownLayerError, ShapeError
            It lacks a layer, or has one of another shape.
        ModelChangedError
            There was no ``penalty()`` before, whose mini-batch it needs.
        NumericalError, NonFiniteError
            The products overflow; the loss is not finite.
        OptionError
            A number is negative or not finite, ``momentum`` above 1 or ``step_lr`` above ``lr``;
            ``own`` is no curvature; ``loss`` cannot be called, or returns no scalar with gradients
            of the model's parameters.

        Examples
        --------
        >>> (criterion(model(x), y) + penalty()).backward()  # doctest: +SKIP
        >>> penalty.precondition(lr)  # doctest: +SKIP
        >>> optimizer.step()  # doctest: +SKIP
        """
        step_lr = lr if step_lr is None else step_lr
        for name, value in (("lr", lr), ("momentum", momentum), ("step_lr", step_lr)):
            require_nonnegative(name, value)
        if momentum > 1.0:
            raise OptionError(f"momentum: expected at most 1, got {momentum:g}")
        if step_lr > lr:
            raise OptionError(f"step_lr: expected at most lr, {lr:g}, got {step_lr:g}")
        if loss is not None and not callable(loss):
            raise OptionError(
                f"loss: expected a callable that returns it, got a {type(loss).__name__}"
            )
        device = self._layers[0].like.device
        of_caller = torch.autocast(
            device.type,
            dtype=torch.get_autocast_dtype(device.type),
            enabled=torch.is_autocast_enabled(device.type),
        )
        with without_autocast(device):
            if not self._stable.steps:
                self._stable.steps = {x.name: self._stable_step(x) for x in self._layers}
            if own is not self._own:
                self._stable.take_own({} if own is None else self._checked_own(own))
                self._own = own
            if self._stable.prepare(lr, self.scale):
                self._together.forget()
            shortening = 1.0
            if loss is not None:
                shortening = self._together.shortening(
                    of_caller(loss),
                    tuple(self._stable.steps.values()),
                    lr,
                    step_lr,
                    self._stable.prepared_lr,
                    reach_of(momentum, nesterov),
                )
            self._stable.apply(lr)
            if shortening < 1.0:
                gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
                torch._foreach_mul_(gradients, shortening)

    def _uses_batch(self, layer: AffineLayer, settled: bool = False) -> bool:
        """Whether a layer is merged by its mini-batch's statistics.

        In train mode, unless settled, and where there are no others.
        """
        if layer.name not in self._batches:
            return False
        return bool(layer.batchnorm.training and not settled) or layer.batchnorm.running_var is None

    def _look(self, modes: tuple[bool, ...]) -> None:
        # Slopes are gradients: a checkpointed pass is made again for them, statistics and all.
        before = kept_statistics(self._model)
        try:
            self._stable.look({layer.name: self._situation(layer) for layer in self._layers}, modes)
        finally:
            put_back(before)

    def _situation(self, layer: AffineLayer) -> Situation | None:
        if layer.name not in self._batches:
            return None
        of_batch = self._uses_batch(layer)
        own = self._batches[layer.name].situation() if of_batch else self._running(layer)
        # One for all ranks, or each would make steps of its own.
        return own if self._ranks.alone else own.mapped(self._ranks.mean)

    @staticmethod
    def _running(layer: AffineLayer) -> Situation:
        """Return running statistics, constants for now."""
        return Situation(*_running_statistics(layer))

    def _stable_step(self, layer: AffineLayer) -> StableStep:
        operator = self._operators[layer.name]
        return StableStep(
            layer,
            self.coordinates == "merged",
            operator.block,
            self.damping,
            partial(self._hessian, layer),
            self._anchor[layer.name],
        )

    def _hessian(self, layer: AffineLayer, scale: float) -> Hessian:
        """Product with the penalty's Hessian, at a scale, in the weights it lives on."""
        operator = self._operators[layer.name]

        def product(V: Tensor) -> Tensor:
            V, moved = V.contiguous(), torch.empty(V.shape, dtype=V.dtype, device=V.device)
            write_products([operator], [V], [moved], scale, self.damping)
            return moved

        return product

    def _deviations(self, settled: bool = False) -> list[Tensor]:
        """Weights less the anchor, as they are now; or under running statistics, if settled."""
        for layer in self._layers:
            self._require_unchanged(layer)
        merged = [x for x in self._layers if self._is_merged(x) and merges_in_the_core(x)]
        statistics = self._statistics(merged, settled)
        together = deviations(
            [
                Merging(layer, *moments, self._anchor[layer.name])
                for layer, moments in zip(merged, statistics, strict=True)
            ]
        )
        known = {layer.name: D for layer, D in zip(merged, together, strict=True)}
        return [
            known[layer.name] if layer.name in known else self._by_itself(layer, settled)
            for layer in self._layers
        ]

    def _is_merged(self, layer: AffineLayer) -> bool:
        return self.coordinates == "merged" and layer.batchnorm is not None

    def _by_itself(self, layer: AffineLayer, settled: bool) -> Tensor:
        # Half precision would not hold a deviation: its gradients are rounded, nothing else.
        if self._is_merged(layer):
            [moments] = self._statistics([layer], settled)
            weight = layer.merged_weight(*moments)
        else:
            weight = layer.raw_weight().to(accumulation_dtype(layer.like.dtype))
        return weight - self._anchor[layer.name]

    def _statistics(
        self, layers: Sequence[AffineLayer], settled: bool
    ) -> list[tuple[Tensor, Tensor]]:
        """Mean and variance, each of shape (D,), that merge these layers."""
        of_batch = {
            layer.name: self._batches[layer.name]
            for layer in layers
            if self._uses_batch(layer, settled)
        }
        moments = dict(zip(of_batch, _moments(list(of_batch.values())), strict=True))
        return [
            moments[layer.name] if layer.name in moments else _running_statistics(layer)
            for layer in layers
        ]

    def _top_eigenvalue_of_parameters(self, layer: AffineLayer) -> float:
        operator = self._operators[layer.name]
        if self.coordinates == "raw" or layer.batchnorm is None:
            return self.scale * operator.top_eigenvalue() + self.damping

        moments = self._input_moments.get(layer.name) if layer.batchnorm.training else None
        situation = self._running(layer) if moments is None else moments.situation(layer)
        return top_eigenvalue_of_parameters(
            View(layer, situation), self._hessian(layer, self.scale)
        )

    def _require_unchanged(self, layer: AffineLayer) -> None:
        expected = ((layer.name, layer.module), (layer.batchnorm_name, layer.batchnorm))
        for name, module in expected:
            if name is None:
                continue
            try:
                current = submodule(self._model, name)
            except AttributeError:
                current = None
            if current is not module:
                raise ModelChangedError(
                    f"layer {name!r}: expected the module this penalty was made for, got another"
                )

    def _checked_anchor(self, anchor: Mapping[str, Tensor]) -> dict[str, Tensor]:
        checked = {}
        for layer in self._layers:
            weight = anchor[layer.name]
            place = f"layer {layer.name!r}: anchor"
            like = layer.like.new_empty((), dtype=accumulation_dtype(layer.like.dtype))
            require_like(place, weight, layer.shape(self.coordinates), like)
            require_finite(place, weight)
            checked[layer.name] = weight.detach().clone(memory_format=torch.contiguous_format)
        return checked

    def _checked_own(self, own: Curvature) -> dict[str, Block]:
        if not isinstance(own, Curvature):
            raise OptionError(f"own: expected a Curvature, got {type(own).__name__}")
        if own.settings.coordinates != self.coordinates:
            raise IncompatibleError(
                f"own: expected a curvature in {self.coordinates} coordinates, got one in "
                f"{own.settings.coordinates}"
            )
        blocks = {}
        for layer in self._layers:
            batchnorm = layer.batchnorm_name
            if layer.name in own and own.batchnorms[layer.name] != batchnorm:
                raise IncompatibleError(
                    f"layer {layer.name!r}: expected an own curvature with {_named(batchnorm)} "
                    f"merged into it, got one with {_named(own.batchnorms[layer.name])}"
                )
            if layer.name not in own:
                raise UnknownLayerError(
                    f"own: expected a block of layer {layer.name!r}, got those of {list(own)}"
                )
            block, anchor = own[layer.name], self._anchor[layer.name]
            if block.shape != anchor.shape:
                raise ShapeError(
                    f"layer {layer.name!r}: expected an own curvature of shape "
                    f"{tuple(anchor.shape)}, got {tuple(block.shape)}"
                )
            held = self._operators[layer.name].block
            if held is not None and isinstance(held, DiagonalBlock) != isinstance(
                block, DiagonalBlock
            ):
                raise IncompatibleError(
                    f"layer {layer.name!r}: expected an own curvature with a "
                    f"{type(held).__name__}, got a {type(block).__name__}"
                )
            blocks[layer.name] = block.to(anchor.device, anchor.dtype)
        return blocks

    def _require_taken_at_anchor(self, curvature: Curvature) -> None:
        for layer in self._layers:
            # Without running statistics a signature is of the raw weights: nothing to compare.
            if layer.batchnorm is not None and layer.batchnorm.running_var is None:
                continue
            at_anchor = Signature.of(self._anchor[layer.name])
            if not curvature.signatures[layer.name].agrees(at_anchor):
                raise ModelChangedError(
                    f"layer {layer.name!r}: expected the last curvature to be taken at the anchor, "
                    "got one of other weights: the model changed between the two"
                )

    def _raise_non_finite(self, from_anchor: Sequence[Tensor]) -> None:
        for layer, deviation in zip(self._layers, from_anchor, strict=True):
            if not is_finite(deviation):
                raise NonFiniteError(
                    f"layer {layer.name!r}: expected finite weights, got NaN or infinity"
                )
        raise NonFiniteError("penalty: expected a finite value, got an overflow")


class _LastBatch:
    """What a layer's BatchNorm saw in the model's last forward pass with gradients.

    A hook that knows whose it is: in a copy of the model it does nothing, and what is pickled with
    the model is `_Deaf`.
    """

    def __init__(self, layer: AffineLayer, ranks: Ranks) -> None:
        self._layer, self._ranks = layer, ranks
        self._values: Tensor | None = None
        self._normalising = Normalising(str(layer.batchnorm_name), layer.batchnorm)
        # What is known of the BatchNorm's call itself.
        self.call: NormalisingCall | None = None
        self._weights: tuple[tuple[int, int, int], ...] = ()

    observes_only = True

    def __call__(
        self,
        module: nn.Module,
        args: tuple[Tensor, ...],
        kwargs: dict[str, Tensor],
        output: Tensor,
    ) -> None:
        if module is not self._layer.batchnorm or not module.training:
            return
        if not torch.is_grad_enabled() or _in_backward_pass() or in_own_pass():
            return
        values = input_of(args, kwargs)
        self._layer.check_batchnorm_input(values)
        self._values, self._weights = values, self._current_weights()
        self.call = self._normalising.call(values, output)

    def __reduce__(self) -> tuple[type["_Deaf"], tuple[()]]:
        return _Deaf, ()

    def forget(self) -> None:
        self._values = self.call = None

    @property
    def is_of_all_ranks(self) -> bool:
        """Whether the mini-batch is that of several processes."""
        return isinstance(self._layer.batchnorm, nn.SyncBatchNorm) and not self._ranks.alone

    def values(self) -> Tensor:
        """Return the BatchNorm's input, with its graph."""
        if self._values is None:
            raise ModelChangedError(
                f"layer {self._layer.batchnorm_name!r}: expected a forward pass in train mode, "
                "with gradients, before penalty(), got none: its batch statistics are part of the "
                "weights"
            )
        if self._weights != self._current_weights():
            raise ModelChangedError(
                f"layer {self._layer.name!r}: expected the parameters of the last forward pass, "
                "got changed ones: call the model again before penalty()"
            )
        if isinstance(self._layer.batchnorm, nn.SyncBatchNorm):
            require_over(str(self._layer.batchnorm_name), self._layer.batchnorm, self._ranks)
        return self._values

    def moments_over_ranks(self) -> tuple[Tensor, Tensor]:
        """Mean and variance, each of shape (D,), over the values of all processes."""
        return moments_of(self.values(), str(self._layer.batchnorm_name), self._ranks)

    def situation(self) -> Situation:
        """Return the moments as values, and how they move with the layer's weights."""
        [(mean, variance)] = _moments([self])
        layer, weight = self._layer, self._layer.module.weight
        if not (layer.absorbs_scale and weight.requires_grad and mean.requires_grad):
            return Situation(mean.detach(), variance.detach())
        slopes = [
            layer.as_matrix(slope.detach()).to(mean.dtype)
            for total in (mean.sum(), variance.sum())
            for slope in torch.autograd.grad(total, weight, retain_graph=True)
        ]
        # Every row of a group sees the same inputs.
        input_mean = layer.by_group(slopes[0])[:, 0]
        return Situation(mean.detach(), variance.detach(), input_mean, slopes[1])

    def _current_weights(self) -> tuple[tuple[int, int, int], ...]:
        """Tell these very parameters, their memory and their contents from any others."""
        return tuple((id(p), p.data_ptr(), p._version) for p in self._layer.parameters("merged"))


def _moments(batches: Sequence[_LastBatch]) -> list[tuple[Tensor, Tensor]]:
    """Mean and variance, each of shape (D,), of mini-batches, with the graphs they came from."""
    own = [batch for batch in batches if not batch.is_of_all_ranks]
    known = iter(moments_of_all([x.values() for x in own], [x.call for x in own]))
    return [x.moments_over_ranks() if x.is_of_all_ranks else next(known) for x in batches]


def _running_statistics(layer: AffineLayer) -> tuple[Tensor, Tensor]:
    """Return copies: the next pass in train mode changes them, and autograd knows nothing of it."""
    dtype = accumulation_dtype(layer.like.dtype)
    mean, variance = layer.running_statistics()
    return mean.to(dtype, copy=True), variance.to(dtype, copy=True)


class _Deaf:
    """A hook that does nothing: all that a copy of the model has of a penalty."""

    observes_only = True

    def __call__(self, *args: object) -> None:
        return None


def _in_backward_pass() -> bool:
    """Whether autograd is at work on this thread, as when a checkpointed pass is made again."""
    return torch._C._current_graph_task_id() != -1


class _Squares:
    """Sums over the layers, each a float or, on a GPU, a tensor that nobody has waited for.

    Attributes
    ----------
    increase
        Half of ``sum_l <D_l, H_l D_l>``.
    distance
        Half of ``sum_l |D_l|**2``.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self.increase: float | Tensor = 0.0
        self.distance: float | Tensor = 0.0

    def add(self, products: InnerProducts) -> None:
        self.increase += 0.5 * self._there(products.curved)
        self.distance += 0.5 * self._there(products.flat)

    def total(self, scale: float, damping: float) -> Tensor:
        total = scale * self.increase
        if damping:
            total += damping * self.distance
        if not isinstance(total, Tensor):
            # Not in one step: a float out of the dtype's range would be an error, not infinite.
            total = self._like.new_full((), total, dtype=torch.float64)
        return total.to(self._like.dtype)

    def _there(self, part: float | Tensor) -> float | Tensor:
        # Layers may be on several devices.
        return part.to(self._like.device) if isinstance(part, Tensor) else part


class _Quadratic(torch.autograd.Function):
    """``1/2 sum_l <D_l, (scale H_l + damping) D_l>``; the product made for the value is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        operators: Sequence[Operator],
        scale: float,
        damping: float,
        squares: _Squares,
        *deviations: Tensor,
    ) -> Tensor:
        held = [D.contiguous() for D in deviations]
        gradients = [torch.empty_like(D) for D in held]
        for products in write_products(operators, held, gradients, scale, damping):
            squares.add(products)
        ctx.save_for_backward(*gradients)
        return squares.total(scale, damping)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Torch's once_differentiable would let the parts through that it does not see.
        if torch.is_grad_enabled():
            raise OptionError(
                "penalty: expected a backward pass without create_graph=True, which it has no "
                "second derivatives for: differentiate the loss alone twice"
            )
        gradients = ctx.saved_tensors
        if grad.is_cuda or grad != 1.0:
            gradients = [grad.to(g.device) * g for g in gradients]
        return (None, None, None, None, *gradients)


# --- moments of inputs --------------------------------------------------------------------------


class _InputMoments:
    """Mean and covariance of a layer's inputs, which tell how its BatchNorm's statistics move."""

    def __init__(self, block: KroneckerSum) -> None:
        self._block = block

    def situation(self, layer: AffineLayer) -> Situation:
        """Return the running statistics, and how they move with the layer's weights.

        The data may have changed since the inputs were seen: a row's multiples keep being
        normalised alike. Where inputs hardly vary, as in dead channels, their variance is
        rounding, and the statistics are constants.
        """
        running_mean, running_variance = (s.double() for s in layer.running_statistics())
        # Over all strata, the input factors add up to the second moment of [a, 1].
        second = reduce(add, (A.double().reshape(-1, *A.shape[-2:]) for A, _ in self._block.terms))
        mean_a, moment_a = second[..., :-1, -1], second[..., :-1, :-1]
        weight = layer.weight().detach().double()
        rows = layer.by_group(weight)
        moved = rows @ moment_a
        square = (moved * rows).sum(-1).flatten()
        mean = (rows @ mean_a[..., None]).flatten()
        variance = square - mean.square()
        slope = 2.0 * (moved.flatten(0, 1) - mean[:, None] * self._by_row(layer, mean_a))
        rounding = _ROUNDING * torch.finfo(self._block.dtype).eps
        known = variance > rounding * square
        share = torch.where(known, running_variance / torch.where(known, variance, 1.0), 0.0)
        to = accumulation_dtype(layer.like.dtype)
        return Situation(
            running_mean.to(to),
            running_variance.to(to),
            mean_a.to(to),
            (share[:, None] * slope).to(to),
        )

    @staticmethod
    def _by_row(layer: AffineLayer, of_groups: Tensor) -> Tensor:
        """Repeat something of each group for each of its rows."""
        rows = len(layer.weight()) // layer.groups
        return of_groups.repeat_interleave(rows, 0)


# A variance below so many roundings of the second moment is nothing but rounding.
_ROUNDING = 1e3


def _input_moments(
    curvatures: Sequence[Curvature], layers: Iterable[AffineLayer]
) -> dict[str, _InputMoments]:
    """Moments of the inputs of every layer that takes up a BatchNorm's scale, where known."""
    # The nearest factors are no moments, and compressed ones are no longer those of one task.
    return {
        layer.name: _InputMoments(block)
        for curvature in curvatures
        if curvature.settings.correction != "nearest" and curvature.max_terms is None
        for layer in layers
        if layer.batchnorm is not None and layer.absorbs_scale
        if isinstance(block := curvature[layer.name], KroneckerSum)
    }


# --- checks --------------------------------------------------------------------------------------

_PRECISIONS = ("auto", "ieee", "tf32")


def _precision_of(layer: AffineLayer, precision: str) -> str:
    """Return that of a layer's products; the core refuses any but "ieee" on the CPU."""
    if precision != "auto":
        return precision
    return layer.torch_precision() if layer.like.is_cuda else "ieee"


def _common_coordinates(curvatures: Sequence[Curvature], wanted: str | None) -> str:
    if wanted is not None:
        require_choice("coordinates", wanted, COORDINATES)
    if not curvatures:
        return wanted or "merged"
    expected = wanted or curvatures[0].settings.coordinates
    require_summable(curvatures, expected)
    return expected


def _bind(
    model: nn.Module,
    curvatures: Sequence[Curvature],
    anchor: Mapping[str, Tensor],
    coordinates: str,
) -> list[AffineLayer]:
    if curvatures:
        layers = bind_layers(model, curvatures[0].batchnorms)
    elif isinstance(anchor, Anchor) and anchor and anchor.keys() <= anchor.batchnorms.keys():
        layers = bind_layers(model, {name: anchor.batchnorms[name] for name in anchor})
    else:
        layers = find_layers(model, coordinates=coordinates, layers=list(anchor))
    if isinstance(anchor, Anchor):
        _require_same_batchnorms(layers, anchor, coordinates)
    _require_anchored(layers, anchor)
    for layer in layers:
        for curvature in curvatures:
            shape = curvature[layer.name].shape
            if shape != layer.shape(coordinates):
                raise ModelChangedError(
                    f"layer {layer.name!r}: expected a curvature of shape "
                    f"{layer.shape(coordinates)}, got {shape}"
                )
    return layers


def _require_anchored(layers: Iterable[AffineLayer], anchor: Mapping[str, Tensor]) -> None:
    for layer in layers:
        if layer.name not in anchor:
            raise UnknownLayerError(
                f"anchor: expected weights of layer {layer.name!r}, got those of {list(anchor)}"
            )


def _require_same_batchnorms(
    layers: Iterable[AffineLayer], anchor: Anchor, coordinates: str
) -> None:
    """Refuse weights merged with another BatchNorm than the one this penalty merges."""
    for layer in layers:
        # One made of weights alone says as little about them as a plain mapping.
        if layer.name not in anchor.batchnorms:
            continue
        expected = layer.batchnorm_name if coordinates == "merged" else None
        got = anchor.batchnorms[layer.name]
        if got != expected:
            raise IncompatibleError(
                f"layer {layer.name!r}: expected an anchor with {_named(expected)} merged into "
                f"it, got one with {_named(got)}: an input batch as example= shows which it feeds"
            )


def _named(batchnorm: str | None) -> str:
    return "no BatchNorm" if batchnorm is None else f"BatchNorm {batchnorm!r}"
