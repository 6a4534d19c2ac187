"""One mini-batch into a layer's block."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ekfac_rs import _core
from ekfac_rs._checks import require_finite
from ekfac_rs._ranks import Ranks, sum_lower_
from ekfac_rs._tensors import accumulation_dtype, borrow
from ekfac_rs.curvature.block import Block, kept_strata
from ekfac_rs.curvature.columnwise import sum_of_terms
from ekfac_rs.curvature.diagonal import DiagonalBlock
from ekfac_rs.curvature.settings import AUTO, DIAGONAL, PassSettings
from ekfac_rs.errors import NonFiniteError
from ekfac_rs.layers import AffineLayer, Units

# Roots of the mean's factor that are kept before they are squared together, and how many of them
# there may be for each row of the factor: they are small beside it.
_MOST_ROOTS = 32
_ROWS_PER_ROOT = 16


# Examples that a mini-batch may have; its number counts in multiples of this.
_MOST_EXAMPLES = 2**32


class Notes:
    """Where a GPU notes which inputs and gradients are not finite, so that nobody waits for it.

    They are read once, at the end of a pass, and until then nothing is made of its sums. On the
    CPU what is not finite is an error at once, and there is nothing to note.

    Parameters
    ----------
    layers : sequence of AffineLayer
    """

    def __init__(self, layers: Sequence[AffineLayer]) -> None:
        self._sides = [(layer.name, side) for layer in layers for side in ("input", "gradient")]
        like = layers[0].like
        on_gpu = borrow(like)[4] != "cpu"
        size = (len(self._sides), 1)
        self._words = like.new_full(size, -1, dtype=torch.int64) if on_gpu else None
        self._batch = -1

    def begin_batch(self) -> None:
        """Count mini-batches: examples are noted together with theirs."""
        self._batch += 1

    def go_on_after(self, batches: int) -> None:
        """Count on from so many mini-batches, in which nothing was noted."""
        self._batch = batches - 1

    def of(self, name: str, side: str) -> _core.Note | None:
        """Return where to note examples of a layer's "input" or "gradient" in this mini-batch."""
        if self._words is None:
            return None
        # The core knows no integers.
        word = self._words[self._sides.index((name, side))].view(torch.float64)
        return borrow(word), self._batch * _MOST_EXAMPLES

    def require_none(self) -> None:
        """Wait for the GPU, once.

        Raises
        ------
        NonFiniteError
            Something was noted; names the first of it.
        """
        if self._words is None:
            return
        noted = self._words.flatten().tolist()
        found = [(number, *side) for number, side in zip(noted, self._sides, strict=True)]
        first = min((entry for entry in found if entry[0] >= 0), default=None)
        if first is not None:
            number, name, side = first
            batch, example = divmod(number, _MOST_EXAMPLES)
            raise NonFiniteError(
                f"layer {name!r}: {side}: expected finite numbers, got NaN or infinity in example "
                f"{example} of mini-batch {batch}"
            )


class _Side:
    """Sums over mini-batches of one factor of each stratum: lower triangles, or diagonals.

    The mean's factor of a mini-batch has rank one: a row and its square. Updating a whole matrix
    for it takes longer than working the row out, so rows are kept and squared together.
    """

    def __init__(
        self,
        approximation: str,
        shape: tuple[int, ...],
        like: Tensor,
        note: Callable[[], _core.Note | None],
    ) -> None:
        self.note = note
        strata = _core.strata()[approximation]
        self.factors = [like.new_zeros(shape) for _ in strata]
        self._mean = strata.index("mean") if "mean" in strata else None
        self._roots: Tensor | None = None
        self._kept = 0
        room = min(_MOST_ROOTS, shape[-1] // _ROWS_PER_ROOT)
        if self._mean is not None and len(shape) > 1 and room > 1:
            self._roots = like.new_zeros(room, *shape[:-1])

    def outputs(self) -> list[Tensor]:
        """Return where a mini-batch is added: in place of the mean's factor, a row for its root."""
        if self._roots is None or self._mean is None:
            return self.factors
        if self._kept == len(self._roots):
            self._square_roots()
        outputs = list(self.factors)
        outputs[self._mean] = self._roots[self._kept]
        return outputs

    def keep(self) -> None:
        """Take what was added to the `outputs` as one mini-batch."""
        self._kept += 1

    def sums(self) -> list[Tensor]:
        """Return the sums."""
        self._square_roots()
        return self.factors

    def state_dict(self) -> dict[str, Any]:
        """Return the sums as they are, with the rows that are not squared yet: no copies."""
        return {"factors": self.factors, "roots": self._roots, "kept": self._kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        for factor, saved in zip(self.factors, state["factors"], strict=True):
            factor.copy_(saved)
        if self._roots is not None:
            self._roots.copy_(state["roots"])
        self._kept = state["kept"]

    def _square_roots(self) -> None:
        if self._roots is None or self._mean is None or not self._kept:
            return
        add_squares(self._roots[: self._kept], self.factors[self._mean], self.note())
        self._roots.zero_()
        self._kept = 0


def add_squares(rows: Tensor, factor: Tensor, note: _core.Note | None) -> None:
    """Add the squares ``x x^T`` of rows, neither centred nor divided, to a lower triangle.

    Parameters
    ----------
    rows : Tensor of shape (rows, n) or (rows, groups, n)
    factor : Tensor of shape (n, n) or (groups, n, n); or (n,), of which they are the diagonal
    note : Note or None
    """
    if factor.dim() == 1:
        factor.add_(rows.square().sum(0))
        return
    options = ("kfac-expand", "gradient", False, 1.0, "ieee")
    _core.accumulate_gram(borrow(rows.flatten(1)), [borrow(factor)], *options, note)


class KroneckerAccumulator:
    """Sums of a layer's factors over mini-batches."""

    def __init__(self, layer: AffineLayer, settings: PassSettings, notes: Notes) -> None:
        dtype = accumulation_dtype(layer.like.dtype)
        like = torch.empty((), dtype=dtype, device=layer.like.device)
        terms = len(_core.strata()[settings.approximation])
        self.approximation = settings.approximation
        self.precision = settings.precision
        if self.precision == AUTO:
            self.precision = layer.torch_precision()
        self.append_one = layer.has_shift(settings.coordinates)
        self.examples = 0
        # A stratum without degrees of freedom in a mini-batch (one example, say) has no gradient
        # factor there, and the mini-batch is left out of that factor's mean.
        self.gradient_examples = [0] * terms
        shape_A, shape_G = layer.factor_shapes(settings.coordinates)
        name = layer.name
        self.A = _Side(self.approximation, shape_A, like, lambda: notes.of(name, "input"))
        self.G = _Side(self.approximation, shape_G, like, lambda: notes.of(name, "gradient"))

    def add_inputs(self, units: Units) -> None:
        """Take a mini-batch's inputs."""
        options = (self.approximation, self.append_one, self.precision, self.A.note())
        degrees_of_freedom = units.accumulate(self.A.outputs(), *options)
        self.A.keep()
        self.examples += len(units)
        for k, dof in enumerate(degrees_of_freedom):
            self.gradient_examples[k] += len(units) if dof else 0

    def add_gradients(self, g: Tensor, weight: float) -> None:
        """Take gradients of the mini-batch whose inputs came last."""
        out = [borrow(G) for G in self.G.outputs()]
        options = (self.approximation, "gradient", False, weight, self.precision, self.G.note())
        _core.accumulate_gram(borrow(g), out, *options)
        self.G.keep()

    def end_batch(self) -> None:
        """Close the mini-batch, of which nothing is kept."""

    def state_dict(self) -> dict[str, Any]:
        """Return the sums between two mini-batches: no copies."""
        return {
            "examples": self.examples,
            "gradient_examples": list(self.gradient_examples),
            "A": self.A.state_dict(),
            "G": self.G.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.examples = state["examples"]
        self.gradient_examples = list(state["gradient_examples"])
        self.A.load_state_dict(state["A"])
        self.G.load_state_dict(state["G"])

    @property
    def counts(self) -> list[int]:
        """Numbers of examples, which are summed over ranks apart from the factors."""
        return [self.examples, *self.gradient_examples]

    @counts.setter
    def counts(self, counts: list[int]) -> None:
        self.examples, *self.gradient_examples = counts

    def reduce(self, ranks: Ranks) -> None:
        """Sum the factors over all ranks, one triangle at a time."""
        for side in (self.A, self.G):
            for factor in side.sums():
                sum_lower_(factor, ranks, "factor")

    def block(self) -> Block:
        """Mean over examples; a stratum that never had a degree of freedom is no term.

        The sums become the means where they lie: to be called once.
        """
        terms = []
        sums_A, sums_G = self.A.sums(), self.G.sums()
        for k in kept_strata(self.gradient_examples):
            A, G = sums_A[k], sums_G[k]
            _divide(A, self.examples)
            _divide(G, self.gradient_examples[k])
            terms.append((A, G))
        return sum_of_terms(terms)


def _divide(factor: Tensor, examples: int) -> None:
    """Make a factor's sum a mean, and its lower triangle the whole."""
    if factor.dim() == 1:  # the diagonal of one
        factor.div_(examples)
    else:
        _core.symmetrize(borrow(factor), float(examples))


class DiagonalAccumulator:
    """Sum over examples of squared per-example gradients, ``sum_n (sum_t g_nt a_nt^T)**2``."""

    def __init__(self, layer: AffineLayer, settings: PassSettings) -> None:
        dtype = accumulation_dtype(layer.like.dtype)
        self.layer = layer
        self.append_one = layer.has_shift(settings.coordinates)
        shape = layer.shape(settings.coordinates)
        self.values = torch.zeros(shape, dtype=dtype, device=layer.like.device)
        self.units: Units | None = None
        self.examples = 0

    def add_inputs(self, units: Units) -> None:
        """Keep a mini-batch's inputs for its gradients."""
        self.units = units.to(self.values.dtype)
        self.examples += len(units)

    def add_gradients(self, g: Tensor, weight: float) -> None:
        """Take gradients of the mini-batch whose inputs came last."""
        assert self.units is not None
        g = g.to(self.values.dtype)
        values = self.values[:, :-1] if self.append_one else self.values
        values.add_(self.layer.squared_gradients(self.units, g), alpha=weight)
        if self.append_one:
            totals = g if g.dim() == 2 else g.sum(dim=1)
            self.values[:, -1].add_(totals.square().sum(dim=0), alpha=weight)

    def end_batch(self) -> None:
        """Let go of the mini-batch's inputs: all its gradients have come."""
        self.units = None

    @property
    def gradient_examples(self) -> list[int]:
        """All of them, for the only stratum."""
        return [self.examples]

    @property
    def counts(self) -> list[int]:
        """Numbers of examples, which are summed over ranks apart from the values."""
        return [self.examples]

    @counts.setter
    def counts(self, counts: list[int]) -> None:
        [self.examples] = counts

    def state_dict(self) -> dict[str, Any]:
        """Return the sum between two mini-batches: no copy."""
        # Nothing notes what is not finite here.
        require_finite(f"layer {self.layer.name!r}: gradient", self.values)
        return {"values": self.values, "examples": self.examples}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.values.copy_(state["values"])
        self.examples = state["examples"]

    def reduce(self, ranks: Ranks) -> None:
        """Sum the values over all ranks."""
        ranks.sum_(self.values, "diagonal")

    def block(self) -> DiagonalBlock:
        """Mean over examples."""
        return DiagonalBlock(self.values / self.examples)


class GlobalBatch:
    """A mini-batch of which each rank has a part, as with `torch.nn.SyncBatchNorm`.

    Parameters
    ----------
    ranks : Ranks
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.examples = 0

    def begin(self, examples: int) -> None:
        """Begin one, of which this rank has so many examples.

        Raises
        ------
        DistributedError
            Another rank has no mini-batch any more.
        """
        [total] = self._ranks.totals([examples], "mini-batch")
        self.examples = round(total)

    def end(self, accumulators: Iterable["Accumulator"]) -> None:
        """Tell each accumulator the means over all ranks: one sum of them all."""
        waiting = [a for a in accumulators if isinstance(a, InStepAccumulator)]
        parts = [part for accumulator in waiting for part in accumulator.parts()]
        if not parts:
            return
        what = f"means with {[accumulator.locations for accumulator in waiting]} locations"
        total = self._ranks.sum_(torch.cat([part.flatten() for part in parts]), what)
        sums = iter(torch.split(total, [part.numel() for part in parts]))
        for accumulator in waiting:
            accumulator.end_global_batch([next(sums) for _ in accumulator.parts()])


class InStepAccumulator(KroneckerAccumulator):
    """Sums over mini-batches of which each rank has a part (method: strata).

    A rank adds what its part has about its own mean. The mean of all ranks, which is known when the
    mini-batch is over, gives the rest: how far the part's mean is from it, and its own square.

    Parameters
    ----------
    layer : AffineLayer
    settings : PassSettings
    notes : Notes
    batch : GlobalBatch
    """

    def __init__(
        self, layer: AffineLayer, settings: PassSettings, notes: Notes, batch: GlobalBatch
    ) -> None:
        super().__init__(layer, settings, notes)
        self._batch = batch
        self._strata = _core.strata()[self.approximation]
        self._mean = self._strata.index("mean")
        # The stratum that the parts' means belong to.
        self._around = self._mean - 1
        self._part = 0
        self.locations = 0
        self._sums: list[Tensor] = []

    def add_inputs(self, units: Units) -> None:
        """Take this rank's part of a mini-batch's inputs."""
        self._part = len(units)
        self.examples += self._part
        out = self.A.factors[:]
        out[self._mean] = mean = self._no_mean(self.A)
        units.accumulate(out, self.approximation, self.append_one, self.precision, self.A.note())
        root = mean.sqrt() if self.A.factors[self._mean].dim() == 1 else mean
        # Its square counts the mean's once for each example.
        self._sums = [root * self._part**0.5]

    def add_gradients(self, g: Tensor, weight: float) -> None:
        """Take gradients of the part whose inputs came last."""
        self.locations = 1 if g.dim() == 2 else g.shape[1]
        out = self.G.factors[:]
        out[self._mean] = mean = self._no_mean(self.G)
        # As if its degrees of freedom were those of the part.
        ratio = self._per_degree(self._batch.examples) / (self._per_degree(self._part) or 1.0)
        out[self._around] = around = torch.zeros_like(out[self._around])
        options = (self.approximation, "gradient", False, weight, self.precision, self.G.note())
        _core.accumulate_gram(borrow(g), [borrow(G) for G in out], *options)
        self.G.factors[self._around].add_(around, alpha=ratio)
        self._sums.append(mean)

    def parts(self) -> list[Tensor]:
        """Return what is summed over ranks: of inputs, and of each score's gradients."""
        return self._sums

    def end_global_batch(self, totals: Sequence[Tensor]) -> None:
        """Take the sums of all ranks' `parts`, flat."""
        N, T = self._batch.examples, self.locations
        for k, stratum in enumerate(self._strata):
            self.gradient_examples[k] += self._part if _degrees_of_freedom(stratum, N, T) else 0
        own_A, *own_G = self._sums
        total_A, *total_G = (
            total.view(own.shape).to(own.dtype)
            for own, total in zip(self._sums, totals, strict=True)
        )
        n, u, U = self._part, self._part * T, N * T
        self._add_means(self.A, [own_A / n], [total_A / N], n, 1.0)
        means, common = [g / u for g in own_G], [g / U for g in total_G]
        self._add_means(self.G, means, common, u * U, self._per_degree(N) / U)
        self._sums = []

    def _add_means(
        self,
        side: _Side,
        own: Sequence[Tensor],
        common: Sequence[Tensor],
        weight: int,
        around: float,
    ) -> None:
        """Add what lies between a part's means and those of all ranks, and a share of theirs.

        Parameters
        ----------
        side : _Side
        own, common : sequence of Tensor
            Means of the part and of all ranks.
        weight : int
            Of the square of the common mean.
        around : float
            What the squares of differences weigh beside it.
        """
        mean = torch.stack(list(common))
        apart = torch.stack(list(own)) - mean
        add_squares(mean * weight**0.5, side.factors[self._mean], side.note())
        add_squares(apart * (weight * around) ** 0.5, side.factors[self._around], side.note())

    def _no_mean(self, side: _Side) -> Tensor:
        """Return zeros in which the root of the mean's factor is added, or its diagonal."""
        factor = side.factors[self._mean]
        return torch.zeros_like(factor if factor.dim() == 1 else factor[..., 0])

    def _per_degree(self, examples: int) -> float:
        """Units for each degree of freedom of the stratum that the parts' means belong to."""
        freedom = _degrees_of_freedom(self._strata[self._around], examples, self.locations)
        return examples * self.locations / freedom if freedom else 0.0


def _degrees_of_freedom(stratum: str, examples: int, locations: int) -> int:
    return {
        "within-batch": examples * locations - 1,
        "within-example": examples * (locations - 1),
        "between-examples": examples - 1,
        "mean": 1,
    }[stratum]


Accumulator = KroneckerAccumulator | DiagonalAccumulator


def accumulator(
    layer: AffineLayer, settings: PassSettings, notes: Notes, batch: GlobalBatch | None = None
) -> Accumulator:
    """Return the accumulator that makes a layer's block under these settings.

    Parameters
    ----------
    layer : AffineLayer
    settings : PassSettings
    notes : Notes
    batch : GlobalBatch, optional
        Where each rank has a part of a mini-batch. What is not centred in it knows no difference.
    """
    if settings.approximation == DIAGONAL:
        return DiagonalAccumulator(layer, settings)
    if batch is not None and "mean" in _core.strata()[settings.approximation]:
        return InStepAccumulator(layer, settings, notes, batch)
    return KroneckerAccumulator(layer, settings, notes)
