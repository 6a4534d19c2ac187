"""Datasets of the experiments: IDX files, MNIST and its embedded subset, loaders in memory."""

from ekfac_rs.data.idx import read_idx
from ekfac_rs.data.mnist import Mnist, find_mnist, load_mnist, load_mnist_subset
from ekfac_rs.data.tensors import TensorLoader, image_features, task_permutation

__all__ = [
    "Mnist",
    "TensorLoader",
    "find_mnist",
    "image_features",
    "load_mnist",
    "load_mnist_subset",
    "read_idx",
    "task_permutation",
]
