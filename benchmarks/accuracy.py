"""How far K-FAC and XK-FAC are from the exact GGN of trained networks with BatchNorm.

Prints one table over several toy problems; takes about a minute.
"""

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / part) for part in ("", "exactness")]

from test_trained_nets import PROBLEMS, measure, summarize  # noqa: E402

HEADER = ("problem", "layers", "K-FAC", "XK-FAC", "ratio: geometric mean", "ninth decile", "worst")


def main() -> None:
    torch.set_num_threads(1)
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


if __name__ == "__main__":
    main()
