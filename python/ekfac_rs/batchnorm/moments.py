"""Moments of mini-batches, by which BatchNorms normalise: taken once, with their way back."""

import sys
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import Node
from torch.nn.modules.batchnorm import _BatchNorm

from ekfac_rs import _core
from ekfac_rs._ranks import Ranks
from ekfac_rs._tensors import accumulation_dtype, borrow

# Of work that is always the host's own.
from ekfac_rs._tensors import borrow as on_host
from ekfac_rs.errors import BatchNormError


def moments_of(values: Tensor, name: str, ranks: Ranks | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, each ``[C]``, of a BatchNorm's input ``[N, C, ...]``.

    Differentiable once. With ranks, over the values of all of them together; messages name the
    BatchNorm.

    Raises
    ------
    BatchNormError
        Over all ranks there is one value a channel.
    """
    [(mean, variance)] = moments_of_all([values])
    if ranks is None or ranks.alone:
        return mean, variance
    own = values.numel() // values.shape[1]
    sums = ranks.summed(torch.cat([own * mean, mean.new_tensor([own])]), f"{name}: batch means")
    count, common = sums[-1].detach(), sums[:-1] / sums[-1].detach()
    if count < 2:
        raise BatchNormError(
            f"layer {name!r}: expected at least 2 values a channel over all ranks, got 1"
        )
    squares = own * (variance + (mean - common).square())
    return common, ranks.summed(squares, f"{name}: batch variances") / count


def moments_of_all(
    inputs: Sequence[Tensor], calls: "Sequence[NormalisingCall | None]" = ()
) -> list[tuple[Tensor, Tensor]]:
    """Mean and biased variance, each ``[C]``, of the inputs ``[N, C, ...]`` of several BatchNorms.

    Differentiable once; NaN where there are no values. In the dtype of sums over the inputs.

    Parameters
    ----------
    inputs : sequence of Tensor
    calls : sequence of NormalisingCall or None
        Those that the inputs were given to, where they are known. What they know is not taken
        again, and gradients take their way where that is shorter.
    """
    if not inputs:
        return []
    calls = calls or [None] * len(inputs)
    wide = [
        x if call is not None else x.to(accumulation_dtype(x.dtype))
        for x, call in zip(inputs, calls, strict=True)
    ]
    moments = _MomentsOf.apply(calls, *wide)
    return list(zip(moments[::2], moments[1::2], strict=True))


# Torch's nodes of BatchNorms, whose results are the output, the mean and one over the deviation.
_NODES = ("NativeBatchNormBackward0", "CudnnBatchNormBackward0")

# What packs tensors that are saved for a backward pass, if anything does: to unpack them may take
# another forward pass.
_saving_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True)


class Normalising:
    """What is remembered of a BatchNorm from one call to the next.

    Attributes
    ----------
    name : str
        For messages.
    sends_gradients : bool
        Whether a gradient of its input came of the last backward pass through it. None does where
        nothing is made of its output, or what comes after it lets no gradient through.
    """

    def __init__(self, name: str, batchnorm: _BatchNorm) -> None:
        self.name = name
        self.sends_gradients = False
        self._batchnorm = batchnorm

    def call(self, x: Tensor, output: Any) -> "NormalisingCall | None":
        """Look at a call of the BatchNorm.

        Parameters
        ----------
        x : Tensor of shape (N, C, ...)
        output
            What it returned.

        Returns
        -------
        NormalisingCall or None
            None where nothing can be seen: it was no call in train mode with gradients, another
            BatchNorm than torch's own made it, of something else than x, or what it saved for the
            way back is packed.
        """
        if (
            torch.compiler.is_compiling()
            or torch._C._functorch.peek_interpreter_stack() is not None
        ):
            return None
        node: Any = getattr(output, "grad_fn", None)
        if node is None or node.name() not in _NODES or _saving_hooks(False):
            return None
        # A BatchNorm may normalise something else than it was given.
        if node.next_functions[0] != (x.grad_fn, x.output_nr):
            return None
        if not node._saved_training or node._saved_input.data_ptr() != x.data_ptr():
            return None
        mean, inverse_deviation = node._saved_result1, node._saved_result2
        if {mean.dtype, inverse_deviation.dtype} != {accumulation_dtype(x.dtype)}:
            return None
        epsilon = self._batchnorm.eps
        return NormalisingCall(mean, inverse_deviation, epsilon, node, _Gradients(self, node))


class NormalisingCall(NamedTuple):
    """What a call of a BatchNorm in train mode has left in autograd's graph.

    Attributes
    ----------
    mean, inverse_deviation : Tensor of shape (C,)
        What it normalised by, in the dtype of sums over its input.
    epsilon : float
    node : torch.autograd.graph.Node
        Its way back.
    gradients : _Gradients
        Of its moments, which wait for the node.
    """

    mean: Tensor
    inverse_deviation: Tensor
    epsilon: float
    node: Node
    gradients: "_Gradients"

    def takes(self, gradient: "_Gradient") -> bool:
        """Take a gradient of the moments along, if this backward pass is yet to come here.

        The input's gradient is then gone through once, as it is made, and not to be made for the
        moments alone and added up. The moments were taken after the call, so that autograd goes
        back through them first.
        """
        task = torch._C._current_graph_task_id()
        if not self.gradients.of.sends_gradients or task in self.gradients.passed:
            return False
        if _is_backward_pass_compiled():
            return False
        nodes = self.node, self.node.next_functions[0][0]
        if not all(n is not None and torch._C._will_engine_execute_node(n) for n in nodes):
            return False
        self.gradients.waiting.setdefault(task, []).append(gradient)
        return True


def _is_backward_pass_compiled() -> bool:
    """Whether this one is compiled autograd's, which wants every gradient that there may be."""
    compiled = sys.modules.get("torch._dynamo.compiled_autograd")
    return bool(getattr(compiled, "in_compiled_autograd_region", False))


class _Gradient(NamedTuple):
    """Gradients of the moments of an input, as far as there are such; of nobody's graph."""

    x: Tensor
    mean: Tensor
    of_mean: Tensor | None
    of_variance: Tensor | None

    def of_input(self) -> Tensor:
        """Return what they become in the input."""
        x = _by_channel(self.x)
        out = torch.empty_like(x)
        self._write(x, out, keep=False)
        return out.view(self.x.shape)

    def add_to(self, of_input: Tensor) -> None:
        """Add what they become in the input to its gradient, whose elements share no memory."""
        out = _by_channel(of_input)
        if out.data_ptr() == of_input.data_ptr():
            self._write(_by_channel(self.x), out, keep=True)
        else:
            of_input += self.of_input()

    def _write(self, x: Tensor, out: Tensor, keep: bool) -> None:
        rows = _in_one_piece(self.of_mean), _in_one_piece(self.of_variance)
        of_mean, of_variance = (None if row is None else borrow(row) for row in rows)
        mean = borrow(self.mean.contiguous())
        _core.moments_backward(borrow(x), mean, of_mean, of_variance, borrow(out), keep)


def _in_one_piece(row: Tensor | None) -> Tensor | None:
    return None if row is None else row.contiguous()


def _by_channel(x: Tensor) -> Tensor:
    """``[N, C, S]``, without a copy of what is of one piece."""
    return x.flatten(2) if x.dim() > 2 else x[..., None]


class _Gradients:
    """A hook of a BatchNorm's node: gradients of its moments join that of its input.

    By autograd's number of a backward pass, several of which may go through one graph. Neither it
    nor what waits knows the node, which knows it: no circle keeps a graph alive, also where a
    backward pass fails before it comes here.
    """

    def __init__(self, of: Normalising, node: Node) -> None:
        self.of = of
        self.waiting: dict[int, list[_Gradient]] = {}
        self.passed: set[int] = set()
        self._hooks = node.register_hook(self).hooks_dict_ref

    def __call__(
        self, of_inputs: tuple[Tensor | None, ...], of_outputs: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...] | None:
        task = torch._C._current_graph_task_id()
        self.passed.add(task)
        gradients = self.waiting.pop(task, [])
        of_x, *others = of_inputs
        self.of.sends_gradients = of_x is not None
        if not gradients:
            return None
        if of_x is None:
            # Torch lets no hook put a gradient where there is none.
            raise BatchNormError(
                f"layer {self.of.name!r}: expected a gradient of its input as in the backward pass "
                "before, got none: what comes after it let none through; go back once more, and "
                "that of its batch statistics takes a way of its own"
            )
        if self._has_company():
            of_x = of_x.clone(memory_format=torch.contiguous_format)  # it may be somebody's
        for gradient in gradients:
            gradient.add_to(of_x)
        return (of_x, *others)

    def _has_company(self) -> bool:
        """Whether others listen to the node, too: they may have kept the gradient, or given it."""
        hooks = self._hooks()
        return hooks is None or not all(isinstance(hook, _Gradients) for hook in hooks.values())


class _MomentsOf(torch.autograd.Function):
    """In the core on a CPU, where `torch.var_mean` takes twenty times as long."""

    @staticmethod
    def forward(
        ctx: Any, calls: Sequence[NormalisingCall | None], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        moments: list[tuple[Tensor, Tensor]] = []
        to_compute: dict[torch.dtype, list[tuple[_core.Tensor, _core.Tensor, _core.Tensor]]] = {}
        variances = iter(_variances([call for call in calls if call is not None]))
        for call, values in zip(calls, inputs, strict=True):
            if call is not None:
                # A tensor of its own, or autograd would take the call's for this function's.
                mean, variance = call.mean.detach(), next(variances)
            elif values.device.type == "cpu":
                mean, variance = values.new_empty(2, values.shape[1])
                task = on_host(_by_channel(values)), on_host(mean), on_host(variance)
                to_compute.setdefault(values.dtype, []).append(task)
            else:
                others = [axis for axis in range(values.dim()) if axis != 1]
                variance, mean = torch.var_mean(values, others, correction=0)
            moments.append((mean, variance))
        for tasks in to_compute.values():
            _core.batch_moments(tasks)
        ctx.calls = calls
        ctx.save_for_backward(*inputs, *(mean for mean, _ in moments))
        ctx.set_materialize_grads(False)
        return tuple(chain.from_iterable(moments))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        # Where it will be differentiated again, nothing may take a way that autograd does not see.
        ctx.may_be_taken = not torch.is_grad_enabled()
        return _MomentsOf._backward(ctx, *gradients)

    @staticmethod
    @once_differentiable
    def _backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        inputs, means = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        of_inputs: list[Tensor | None] = []
        for call, x, mean, of_mean, of_variance, wanted in zip(
            *(ctx.calls, inputs, means, gradients[::2], gradients[1::2]),
            ctx.needs_input_grad[1:],
            strict=True,
        ):
            gradient = _Gradient(x.detach(), mean.detach(), of_mean, of_variance)
            nothing = not wanted or (of_mean is None and of_variance is None)
            taken = nothing or (call is not None and ctx.may_be_taken and call.takes(gradient))
            of_inputs.append(None if taken else gradient.of_input())
        return (None, *of_inputs)


def _variances(calls: Sequence[NormalisingCall]) -> list[Tensor]:
    """Return the population variances that BatchNorms normalised by."""
    if not calls:
        return []
    variances = torch._foreach_pow([call.inverse_deviation for call in calls], -2.0)
    torch._foreach_sub_(variances, [call.epsilon for call in calls])
    torch._foreach_clamp_min_(variances, 0.0)
    return list(variances)
