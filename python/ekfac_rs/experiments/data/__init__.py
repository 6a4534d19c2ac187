"""Datasets of the experiments: IDX files, MNIST, folders of images, loaders in memory."""

from ekfac_rs.experiments.data.idx import read_idx
from ekfac_rs.experiments.data.images import ImageLoader, ImageSet, ImageTree
from ekfac_rs.experiments.data.locate import find_data
from ekfac_rs.experiments.data.mnist import Mnist, find_mnist, load_mnist, load_mnist_subset
from ekfac_rs.experiments.data.tensors import TensorLoader, image_features, task_permutation

__all__ = [
    "ImageLoader",
    "ImageSet",
    "ImageTree",
    "Mnist",
    "TensorLoader",
    "find_data",
    "find_mnist",
    "image_features",
    "load_mnist",
    "load_mnist_subset",
    "read_idx",
    "task_permutation",
]
