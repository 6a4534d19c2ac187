"""Tensors in memory as loaders, and the permuted tasks made from one dataset."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ekfac_rs.errors import OptionError, ShapeError

__all__ = ["TensorLoader", "image_features", "task_permutation"]

# Mean and standard deviation of the pixels of MNIST's training set, on the scale 0 to 1.
_PIXEL_MEAN, _PIXEL_STD = 0.1307, 0.3081


class TensorLoader:
    """Mini-batches of two tensors in memory, without the overhead of a `DataLoader`.

    Re-iterable: every iteration is one epoch, in a new order when `shuffle` is set.

    Parameters
    ----------
    x
        Inputs, ``[n, ...]``.
    y
        Targets, ``[n, ...]``.
    batch_size
        Examples per mini-batch; the last one may be smaller.
    shuffle
        Draw a new order for each epoch.
    generator
        Source of the orders; torch's global one by default.
    drop_last
        Leave out a last, smaller mini-batch.

    Raises
    ------
    ShapeError
        If `x` and `y` differ in length.
    OptionError
        If `batch_size` is below 1.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        batch_size: int,
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        drop_last: bool = False,
    ) -> None:
        if x.dim() == 0 or y.dim() == 0 or len(x) != len(y):
            raise ShapeError(
                f"x, y: expected equally many examples, got {list(x.shape)} and {list(y.shape)}"
            )
        if batch_size < 1:
            raise OptionError(f"batch_size: expected at least 1, got {batch_size}")
        self.x = x
        self.y = y
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.generator = generator
        self.drop_last = drop_last

    def __len__(self) -> int:
        """Return the number of mini-batches in an epoch."""
        whole, rest = divmod(len(self.x), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the mini-batches ``(x, y)`` of one epoch."""
        starts = range(0, len(self) * self.batch_size, self.batch_size)
        if not self.shuffle:
            for start in starts:
                rows = slice(start, start + self.batch_size)
                yield self.x[rows], self.y[rows]
            return
        order = torch.randperm(len(self.x), generator=self.generator).to(self.x.device)
        for start in starts:
            chosen = order[start : start + self.batch_size]
            yield self.x.index_select(0, chosen), self.y.index_select(0, chosen)


def image_features(images: npt.NDArray[np.uint8]) -> Tensor:
    """Turn grey images into feature vectors.

    Pixels are divided by 255, then standardised with one mean (0.1307) and one standard
    deviation (0.3081) for all pixels, those of MNIST's training set: a permutation of the pixels
    thus keeps the distribution of the features as a set.

    Parameters
    ----------
    images
        ``uint8 [n, height, width]``.

    Returns
    -------
    Tensor
        ``float32 [n, height * width]``.
    """
    pixels = torch.from_numpy(images.reshape(len(images), -1)).to(torch.float32)
    return pixels.div_(255.0).sub_(_PIXEL_MEAN).div_(_PIXEL_STD)


def task_permutation(features: int, task: int, seed: int) -> Tensor:
    """Return the order of the features in one permuted task.

    Task 0 keeps the original order (a fully connected network with exchangeable initial weights
    cannot tell it from any other); the others get a permutation that depends on `seed` and
    `task` alone, so the first tasks of a longer stream are those of a shorter one.

    Parameters
    ----------
    features
        Number of features.
    task
        Task number, from 0.
    seed
        Seed of the stream of tasks.

    Returns
    -------
    Tensor
        ``int64 [features]``; the task's inputs are ``x[:, permutation]``.

    References
    ----------
    I. Goodfellow et al., "An Empirical Investigation of Catastrophic Forgetting in
    Gradient-Based Neural Networks", 2013, arXiv 1312.6211, section 4.
    """
    if task == 0:
        return torch.arange(features)
    order = np.random.default_rng((seed, task)).permutation(features)
    return torch.from_numpy(order)
