"""Gradients at places of a graph, handed over one by one as autograd reaches them."""

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle

Taker = Callable[[str, Tensor], None]

# Bytes of gradients that may wait for each other: small ones are worked off faster in a row than
# between autograd's own operations.
_TOGETHER = 1 << 23


class Gradients:
    """Named places of a graph at which gradients are wanted, one at a time.

    ``torch.autograd.grad`` over all of them would return all gradients at once, of which a deep
    network has about as many numbers as activations. Here each is handed over while autograd is
    at its place, small ones a few together, and goes when autograd moves on. Nodes run, hooks are
    called and values come as in that one call: its gradients are those before any hook of the
    user's at the same place, but for the places that nothing is wanted behind.
    """

    def __init__(self) -> None:
        self._edges: dict[str, GradientEdge] = {}
        self._handles: dict[str, RemovableHandle] = {}
        self._foremost: frozenset[str] = frozenset()
        # Set while a backward pass of our own runs: a model may have some in its forward.
        self._take: Taker | None = None

    def watch(self, name: str, value: Tensor) -> None:
        """Want the gradient with respect to a value, before anybody else sees or changes it.

        Of several values of a name it is the last.
        """
        if name in self._handles:
            self._handles[name].remove()
        self._edges[name] = get_gradient_edge(value)
        self._handles[name] = value.register_hook(  # type: ignore[no-untyped-call]
            lambda g: self._reached(name, g)
        )

    def clear(self) -> None:
        """Forget all places, and leave no hook behind."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self._edges.clear()

    def hand_over(
        self, outputs: Tensor, score: Tensor, take: Taker, *, keep_graph: bool
    ) -> frozenset[str]:
        """Go backward from the outputs once.

        Parameters
        ----------
        outputs : Tensor
        score : Tensor
            Gradient with respect to the outputs.
        take : callable
            Called with a place's name and its gradient, which is not to be kept.
        keep_graph : bool
            Whether there will be another pass. What the last one is through with is freed.

        Returns
        -------
        frozenset of str
            The places that were reached.
        """
        reached: set[str] = set()
        waiting: list[tuple[str, Tensor]] = []

        def taking(name: str, g: Tensor) -> None:
            reached.add(name)
            waiting.append((name, g))
            if sum(g.nbytes for _, g in waiting) > _TOGETHER:
                work_off()

        def work_off() -> None:
            while waiting:
                take(*waiting.pop(0))

        # Whoever asks for these makes autograd pass by all others.
        foremost = _foremost(outputs.grad_fn, self._edges)
        if not foremost:
            return frozenset()
        self._foremost, self._take = frozenset(foremost), taking
        try:
            gradients = torch.autograd.grad(
                outputs,
                [self._edges[name] for name in foremost],
                grad_outputs=score,
                retain_graph=keep_graph,
                allow_unused=True,
            )
        finally:
            self._take = None
        for name, g in zip(foremost, gradients, strict=True):
            if g is not None:
                taking(name, g)
        work_off()
        return frozenset(reached)

    def _reached(self, name: str, g: Tensor | None) -> None:
        if self._take is not None and name not in self._foremost and g is not None:
            self._take(name, g)


def _foremost(root: Node | None, edges: Mapping[str, GradientEdge]) -> Collection[str]:
    """Names of the places within reach of the root with no other place behind them."""
    places = {edge.node for edge in edges.values()}
    # Whether there is a place behind a node; every node is looked at after all behind it.
    behind: dict[Node, bool] = {}
    stack = [root] if root is not None else []
    while stack:
        node = stack[-1]
        following = [next_node for next_node, _ in node.next_functions if next_node is not None]
        ahead = [next_node for next_node in following if next_node not in behind]
        if ahead:
            stack.extend(ahead)
            continue
        behind[stack.pop()] = any(n in places or behind[n] for n in following)
    return [name for name, edge in edges.items() if behind.get(edge.node) is False]
