"""What decides what a curvature pass computes."""

from dataclasses import asdict, dataclass
from typing import Any

from ekfac_rs import _core
from ekfac_rs._checks import require_choice, require_count
from ekfac_rs.layers import COORDINATES
from ekfac_rs.likelihood import LABELS, Likelihood

DIAGONAL = "diagonal"
APPROXIMATIONS = (*_core.strata(), DIAGONAL)
STATISTICS = ("batch", "running")
AUTO = "auto"
PRECISIONS = (AUTO, "ieee", "tf32", "bf16")
CORRECTIONS = ("scale", "eigenvalues", "nearest")


@dataclass(frozen=True)
class PassSettings:
    """Everything that decides what a pass computes, the model and its data apart.

    Two passes can only be merged under equal settings; files keep them.

    Attributes
    ----------
    likelihood : str
        The loss, with its reduction: the ``repr`` of a `Likelihood`.
    approximation, coordinates, statistics, labels, draws, correction
        As given to `estimate_curvature`.
    precision : str
        As given, or what "auto" came to: still "auto" where that differed between layers.
    frozen : tuple of str
        With batch statistics, the BatchNorms that used running ones all the same, because their
        user keeps them in eval mode.

    Raises
    ------
    OptionError
        An unknown option or correction, or draws below 1.
    """

    likelihood: str
    approximation: str
    coordinates: str
    statistics: str
    labels: str
    draws: int
    precision: str
    frozen: tuple[str, ...] = ()
    correction: str | None = None

    def __post_init__(self) -> None:
        require_choice("approximation", self.approximation, APPROXIMATIONS)
        require_choice("coordinates", self.coordinates, COORDINATES)
        require_choice("statistics", self.statistics, STATISTICS)
        require_choice("labels", self.labels, LABELS)
        require_choice("precision", self.precision, PRECISIONS)
        if self.correction is not None:
            require_choice("correction", self.correction, CORRECTIONS)
        require_count("draws", self.draws)
        object.__setattr__(self, "frozen", tuple(self.frozen))  # a list, where read from a file

    @classmethod
    def of(cls, likelihood: Likelihood, **settings: Any) -> "PassSettings":
        """Make the settings of passes under this loss."""
        return cls(likelihood=repr(likelihood), **settings)

    @property
    def kind(self) -> str:
        """Approximation and correction in words."""
        return kind_in_words(self.approximation, self.correction)

    def differences(self, other: "PassSettings") -> dict[str, tuple[Any, Any]]:
        """Return the settings that are not the same in both, and their values."""
        mine, theirs = asdict(self), asdict(other)
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}


def kind_in_words(approximation: str | None, correction: str | None) -> str:
    """Say what an approximation with a correction is called in messages."""
    corrected = "" if correction is None else f" with {correction!r} corrected"
    return f"{approximation!r}{corrected}"
