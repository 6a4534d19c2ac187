"""Make python/ekfac_rs/experiments/data/mnist_subset.npz from the whole of MNIST.

    python scripts/make_mnist_subset.py --data-dir FOLDER

FOLDER holds MNIST's four IDX files; without it, the folder named by EKFAC_DATA or a download.
"""

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ekfac_rs.experiments.data.mnist import SUBSET_FILE, load_mnist

SEED = 2004
TRAIN_EXAMPLES = 10_000
TEST_EXAMPLES = 2_000
SIZE_LIMIT = 2_500_000
OUTPUT = Path(__file__).resolve().parents[1] / "python/ekfac_rs/experiments/data" / SUBSET_FILE
PROVENANCE = (
    "Stratified subset of the MNIST database of handwritten digits by Yann LeCun, Corinna Cortes "
    "and Christopher J. C. Burges (http://yann.lecun.com/exdb/mnist/), pixels and labels "
    f"unchanged. Selected by scripts/make_mnist_subset.py, seed {SEED}; train_rows and test_rows "
    "are the rows in MNIST's own order. Licence: Creative Commons Attribution-ShareAlike 3.0 "
    "(CC BY-SA 3.0, https://creativecommons.org/licenses/by-sa/3.0/)."
)


def main() -> None:
    """Read MNIST, draw the subset, write it."""
    parser = argparse.ArgumentParser(description="Make the embedded MNIST subset.")
    parser.add_argument("--data-dir", type=Path, help="folder with MNIST's IDX files")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: %(default)s")
    options = parser.parse_args()

    mnist = load_mnist(options.data_dir)
    generator = np.random.default_rng(SEED)
    train_rows = stratified_rows(mnist.train_labels, TRAIN_EXAMPLES, generator)
    test_rows = stratified_rows(mnist.test_labels, TEST_EXAMPLES, generator)
    np.savez_compressed(
        options.output,
        train_images=mnist.train_images[train_rows],
        train_labels=mnist.train_labels[train_rows],
        train_rows=train_rows.astype(np.int32),
        test_images=mnist.test_images[test_rows],
        test_labels=mnist.test_labels[test_rows],
        test_rows=test_rows.astype(np.int32),
        provenance=np.array(PROVENANCE),
    )
    size = options.output.stat().st_size
    if size > SIZE_LIMIT:
        raise SystemExit(f"{options.output}: {size} bytes, more than the limit of {SIZE_LIMIT}")
    print(f"{options.output}: {size} bytes")


def stratified_rows(
    labels: npt.NDArray[np.uint8], count: int, generator: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Draw `count` rows so that each class keeps its share; sorted.

    Shares are rounded by largest remainder, so that they add up to `count`.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    shares = sizes * count / len(labels)
    quotas = np.floor(shares).astype(np.int64)
    short = count - int(quotas.sum())
    quotas[np.argsort(quotas - shares, kind="stable")[:short]] += 1
    drawn = [
        generator.choice(np.flatnonzero(labels == digit), quota, replace=False)
        for digit, quota in zip(classes, quotas, strict=True)
    ]
    return np.sort(np.concatenate(drawn))


if __name__ == "__main__":
    main()
