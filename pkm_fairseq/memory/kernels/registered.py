"""The operations in graphs of ``torch.compile``: registered with torch, with shapes and gradients.

At run time each calls the operation of this package, so compiled code uses the fast backends, too.
Graphs of an export hold torch's own operations, so they run without this package.
"""

from typing import Any, Callable, Optional, Tuple

import torch
from torch import Tensor

from .tables import Entries
from .torch_backend import row_gradients

graph_ops: Any = torch.ops.pkm_fairseq


def register(
    function: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Optional[Callable[..., Any]] = None,
    keep: Optional[Callable[..., Tuple[Tensor, ...]]] = None,
) -> None:
    """Register an operation under its own name, and so add it to ``graph_ops``.

    Args:
        function: the operation, on plain data.
        fake: makes empty outputs of the right shape.
        backward: computes the gradients of all inputs; it needs ``keep``.
        keep: returns, from inputs and output, the tensors that the backward pass needs.
    """
    name = f"pkm_fairseq::{function.__name__}"
    operation = torch.library.custom_op(name, function, mutates_args=())
    operation.register_fake(fake)
    if backward is None or keep is None:
        return

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*keep(inputs, output))

    operation.register_autograd(backward, setup_context=setup)


def table_gradient(values: Tensor, slots: Tensor, weights: Tensor, grad_read: Tensor) -> Tensor:
    """The dense gradient of ``gather_sum`` for the table; its first arguments are the same."""
    n, reads = slots.shape
    bags = torch.arange(n, device=slots.device).repeat_interleave(reads)
    entries = Entries(slots.flatten(), weights.flatten(), bags, grad_read.contiguous())
    if values.dtype == grad_read.dtype:  # as torch does for F.embedding_bag
        unused, n_slots = slots.new_empty(0), len(values)
        given = entries.grads, entries.slots, bags, unused, unused, n_slots, False, 0
        return torch.ops.aten._embedding_bag_dense_backward(*given, entries.weights)  # type: ignore[no-any-return]
    dense = torch.zeros_like(values)
    for rows, of_rows in row_gradients(entries):
        dense[rows] = of_rows.to(dense.dtype)
    return dense


def register_all(
    gather_sum: Callable[..., Tensor],
    gather_dot: Callable[..., Tensor],
    score_gradients: Callable[..., Tuple[Tensor, Tensor]],
) -> None:
    """Register the operations of this package."""
    register(table_gradient, lambda values, *_: torch.empty_like(values))
    register(score_gradients, lambda *given: tuple(x.new_empty(x.shape) for x in given[:2]))
    register(gather_sum, _sum_shape, _sum_backward, lambda inputs, _: inputs)
    register(gather_dot, _dot_shape, _dot_backward, lambda inputs, _: inputs)


def _sum_shape(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    return weights.new_empty(slots.shape[0], values.shape[1])


def _dot_shape(values: Tensor, slots: Tensor, grad_read: Tensor) -> Tensor:
    return grad_read.new_empty(slots.shape)


def _sum_backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], None, Optional[Tensor]]:
    values, slots, weights = ctx.saved_tensors
    of_values, _, of_weights = ctx.needs_input_grad
    return (
        graph_ops.table_gradient(values, slots, weights, grad) if of_values else None,
        None,
        graph_ops.gather_dot(values, slots, grad) if of_weights else None,
    )


def _dot_backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], None, Optional[Tensor]]:
    values, slots, x = ctx.saved_tensors
    of_values, _, of_x = ctx.needs_input_grad
    return (
        graph_ops.table_gradient(values, slots, grad, x) if of_values else None,
        None,
        graph_ops.gather_sum(values, slots, grad) if of_x else None,
    )
