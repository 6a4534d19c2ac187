"""How far K-FAC and XK-FAC are from the exact GGN of trained networks with BatchNorm.

Prints tables over several toy problems, for Linear layers and for convolutions; takes about five
minutes.
"""

import math
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / part) for part in ("", "exactness")]

import test_trained_conv_nets as conv_nets  # noqa: E402
from test_trained_nets import PROBLEMS, measure, summarize  # noqa: E402

from cases import APPROXIMATIONS  # noqa: E402

HEADER = ("problem", "layers", "K-FAC", "XK-FAC", "ratio: geometric mean", "ninth decile", "worst")


CONV_HEADER = ("networks", "problem", "pixels", "layers", *APPROXIMATIONS)


def main() -> None:
    torch.set_num_threads(1)
    compare_linear_layers()
    compare_convolutions()


def compare_linear_layers() -> None:
    results = {problem: measure(problem) for problem in PROBLEMS}
    for interacting, title in (
        (True, "Linears fed by a ReLU, a train-mode BatchNorm after them"),
        (False, "every other Linear"),
    ):
        print(f"\n{title}: mean relative Frobenius error\n")
        print("| " + " | ".join(HEADER) + " |\n" + "|---" * len(HEADER) + "|")
        for problem, rows in results.items():
            s = summarize([row for row in rows if row.interacting is interacting])
            numbers = (s.kfac, s.xkfac, s.geometric_mean, s.ninth_decile, s.worst)
            print(f"| {problem} | {s.layers} | " + " | ".join(f"{x:.3f}" for x in numbers) + " |")


def compare_convolutions() -> None:
    """Each cell: geometric mean of the error over that of the better of expand and reduce, the
    same with every block times its best scalar, and the worst layer.
    """
    results = {
        (ending, problem, size): conv_nets.measure(bodies, (size,), problem)
        for ending, bodies in (
            ("flattened", conv_nets.FLATTENED),
            ("global pooling", conv_nets.AVERAGED),
        )
        for problem in conv_nets.PROBLEMS
        for size in (6, 14)
    }
    for situation, chosen in conv_nets.SITUATIONS.items():
        print(f"\nConvolutions, {situation}: ratio (calibrated), worst\n")
        print("| " + " | ".join(CONV_HEADER) + " |\n" + "|---" * len(CONV_HEADER) + "|")
        for (ending, problem, size), rows in results.items():
            s = conv_nets.summarize([row for row in rows if chosen(row)])
            if math.isnan(s.geometric_mean[APPROXIMATIONS[0]]):
                continue  # a training diverged
            cells = " | ".join(
                f"{s.geometric_mean[name]:.2f} ({s.calibrated[name]:.2f}), {s.worst[name]:.2f}"
                for name in APPROXIMATIONS
            )
            print(f"| {ending} | {problem} | {size} | {s.layers} | {cells} |")


if __name__ == "__main__":
    main()
