"""The index ops that the rewrite inserts: rows to nodes, nodes to rows, and the gradients of both.

They are ``torch.library`` ops, so that a rewritten graph says what it does. Two pairs, each the adjoint of the other::

    fold_rows      compact[n] = full[fold[n]]                    one row for each node
    place_rows     full[t] = compact[scatter[t]] if fold[scatter[t]] == t else 0
    scatter_rows   full[t] = compact[scatter[t]]                 the node of each row
    sum_rows       compact[n] = sum of full[t] over the rows t of node n

None of them uses atomics, so that equal inputs give equal bits; sums are accumulated in float32 at least.
``foreach_scatter_rows`` and ``foreach_sum_rows`` move several tensors in one launch. ``gather_columns`` looks up a
table with one entry for each column.

In every signature ``full`` is ``[..., B, ..., S, ...]`` with the batch at ``batch_dim`` and the sequence at
``seq_dim`` (not negative); ``compact`` has 1 and ``T'`` there. Any strides, any dtype. Results have contiguous rows,
``[B, S, features]`` in memory. Of the plan, ``fold`` ``[T']`` has one row ``b * S + s`` for each node and ``scatter``
``[B * S]`` the node of each row, -1 for a row that is left out (then ``holes`` says so, and the row is zero). ``rows``
``[B * S]`` and ``starts`` ``[T' + 1]`` are the rows of each node in CSR form: those of node ``n`` are
``rows[starts[n]:starts[n + 1]]``, that of ``fold`` first; ``pieces`` ``[P]`` is how long lists are divided, see
``PrefixPlan.row_lists``. ``scatter_rows`` needs the lists for its gradient only. All indices are int64.

Triton kernels run on CUDA (``triton_rows``, ``triton_sums``), torch code elsewhere (``reference``). Inductor is given
some as plain indexing instead: ``decompositions``.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from radix_compile.kernels import reference
from radix_compile.kernels.row_layout import empty_rows

radix = torch.ops.radix

_LISTS = "Tensor fold, Tensor rows, Tensor starts, Tensor pieces"
_MAYBE_LISTS = _LISTS.replace("Tensor", "Tensor?")
_FULL = "SymInt batch, SymInt seq"
_AXES = "int batch_dim, int seq_dim"
_EACH = "int[] batch_dims, int[] seq_dims"
_SCHEMAS = (
    f"fold_rows(Tensor full, Tensor fold, Tensor scatter, {_AXES}) -> Tensor",
    f"place_rows(Tensor compact, Tensor fold, Tensor scatter, {_FULL}, {_AXES}) -> Tensor",
    f"scatter_rows(Tensor compact, Tensor scatter, {_MAYBE_LISTS}, {_FULL}, {_AXES}, bool holes) -> Tensor",
    f"sum_rows(Tensor full, Tensor scatter, {_LISTS}, {_AXES}) -> Tensor",
    f"foreach_scatter_rows(Tensor[] compact, Tensor scatter, {_MAYBE_LISTS}, {_FULL}, {_EACH}, bool holes) -> Tensor[]",
    f"foreach_sum_rows(Tensor[] full, Tensor scatter, {_LISTS}, {_EACH}) -> Tensor[]",
    f"gather_columns(Tensor table, Tensor fold, Tensor scatter, {_FULL}, int dim) -> Tensor",
)

# ---------------------------------------------------------------------------------------------------------- which code


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _run(name: str, moved: Any, *args: Any) -> Any:
    """The op by its Triton kernel, if there is one for these tensors."""
    if name in ("scatter_rows", "sum_rows"):  # a list of one
        *plan, batch_dim, seq_dim = args[: 9 if name == "scatter_rows" else 7]
        return _run(f"foreach_{name}", [moved], *plan, [batch_dim], [seq_dim], *args[len(plan) + 2 :])[0]
    tensors: Sequence[Tensor] = [moved] if isinstance(moved, Tensor) else moved
    if has_triton() and all(tensor.is_cuda for tensor in tensors):
        from radix_compile.kernels import triton_rows, triton_sums

        sums = name == "foreach_sum_rows"
        if all(tensor.dtype in (triton_rows.FLOATS if sums else triton_rows.DTYPES) for tensor in tensors):
            return getattr(triton_sums if sums else triton_rows, name)(moved, *args)
    return getattr(reference, name)(moved, *args)


# ----------------------------------------------------------------------------------------------- shapes and strides


def _fake_compact(full: Tensor, nodes: int, batch_dim: int, seq_dim: int) -> Tensor:
    return empty_rows(full, 1, nodes, batch_dim, seq_dim)


def _fake_foreach_scatter_rows(compact: Any, *rest: Any) -> list[Tensor]:
    batch, seq, batch_dims, seq_dims = rest[5:9]
    return [empty_rows(one, batch, seq, *at) for one, *at in zip(compact, batch_dims, seq_dims, strict=True)]


def _fake_foreach_sum_rows(full: Any, scatter: Any, fold: Any, *rest: Any) -> list[Tensor]:
    axes = rest[3:]
    return [_fake_compact(one, fold.shape[0], *at) for one, *at in zip(full, *axes, strict=True)]


def _fake_gather_columns(table: Tensor, fold: Tensor, scatter: Tensor, batch: int, seq: int, dim: int) -> Tensor:
    return empty_rows(table.unsqueeze(0), 1, fold.shape[0], 0, dim + 1).squeeze(0)


_FAKES: dict[str, Callable[..., Any]] = {
    "fold_rows": lambda full, fold, scatter, *axes: _fake_compact(full, fold.shape[0], *axes),
    "place_rows": lambda compact, fold, scatter, *full: empty_rows(compact, *full),
    "scatter_rows": lambda compact, *rest: empty_rows(compact, *rest[5:9]),
    "sum_rows": lambda full, scatter, fold, rows, starts, pieces, *axes: _fake_compact(full, fold.shape[0], *axes),
    "foreach_scatter_rows": _fake_foreach_scatter_rows,
    "foreach_sum_rows": _fake_foreach_sum_rows,
    "gather_columns": _fake_gather_columns,
}


# ---------------------------------------------------------------------------------------------------------- gradients


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """For a gradient: the plan and sizes, never a row."""
    first = inputs[0] if isinstance(inputs[0], Tensor) else inputs[0][0]
    plan = [value for value in inputs[1:] if value is None or isinstance(value, Tensor)]
    ctx.save_for_backward(*plan)
    ctx.rest = inputs[1 + len(plan) :]
    ctx.first_shape = first.shape


def _nothing(ctx: Any) -> list[None]:
    """For the arguments without a gradient."""
    return [None] * (len(ctx.saved_tensors) + len(ctx.rest))


def _fold_rows_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    batch_dim, seq_dim = ctx.rest
    size = ctx.first_shape[batch_dim], ctx.first_shape[seq_dim]
    return (radix.place_rows(grad, *ctx.saved_tensors, *size, batch_dim, seq_dim), *_nothing(ctx))


def _place_rows_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return (radix.fold_rows(grad, *ctx.saved_tensors, *ctx.rest[2:]), *_nothing(ctx))


def _scatter_rows_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return (radix.sum_rows(grad, *_with_lists(ctx), *ctx.rest[2:4]), *_nothing(ctx))


def _foreach_scatter_rows_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    """Integers and bools that move along have no gradient, but get one here."""
    moved = [grad.is_floating_point() or grad.is_complex() for grad in grads]
    each = [list(itertools.compress(values, moved)) for values in (grads, *ctx.rest[2:4])]
    sums = iter(radix.foreach_sum_rows(each[0], *_with_lists(ctx), *each[1:]))
    return ([next(sums) if one else None for one in moved], *_nothing(ctx))


def _with_lists(ctx: Any) -> tuple[Tensor, ...]:
    plan: tuple[Tensor, ...] = ctx.saved_tensors
    if any(tensor is None for tensor in plan):
        raise RuntimeError("the gradient of scatter_rows needs lists: pass `fold`, `rows`, `starts` and `pieces`")
    return plan


def _sum_rows_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    batch_dim, seq_dim = ctx.rest
    size = ctx.first_shape[batch_dim], ctx.first_shape[seq_dim]
    return (radix.scatter_rows(grad, *ctx.saved_tensors, *size, batch_dim, seq_dim, True), *_nothing(ctx))


def _foreach_sum_rows_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    batch_dims, seq_dims = ctx.rest
    size = ctx.first_shape[batch_dims[0]], ctx.first_shape[seq_dims[0]]
    full = radix.foreach_scatter_rows(grads, *ctx.saved_tensors, *size, batch_dims, seq_dims, True)
    return (full, *_nothing(ctx))


def _gather_columns_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    batch, seq, dim = ctx.rest
    # Each row is placed at its own column, so the sum over sequences is the sum over the nodes of a column.
    full = radix.place_rows(grad.unsqueeze(0), *ctx.saved_tensors, batch, seq, 0, dim + 1)
    return (full.sum(0), *_nothing(ctx))


_BACKWARDS: dict[str, Callable[..., Any]] = {
    "fold_rows": _fold_rows_backward,
    "place_rows": _place_rows_backward,
    "scatter_rows": _scatter_rows_backward,
    "sum_rows": _sum_rows_backward,
    "foreach_scatter_rows": _foreach_scatter_rows_backward,
    "foreach_sum_rows": _foreach_sum_rows_backward,
    "gather_columns": _gather_columns_backward,
}

# ------------------------------------------------------------------------------------------------------- registration

library = torch.library.Library("radix", "DEF")
for _schema in _SCHEMAS:
    _name = _schema.split("(")[0]
    library.define(_schema)
    library.impl(_name, functools.partial(_run, _name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"radix::{_name}", _FAKES[_name], lib=library)
    torch.library.register_autograd(f"radix::{_name}", _BACKWARDS[_name], setup_context=_keep, lib=library)


def decompositions(device: torch.device) -> dict[Any, Callable[..., Any]]:
    """The gathers that inductor should have as plain indexing, to fuse with their neighbours; the rest are kernels.

    The sums never: as plain indexing they are atomic additions. For the gathers it is what was measured, by
    ``benchmarks.bench_cuts``, in benchmarks/results. On a CPU indexing is 0.9x to 1.8x as fast for the
    scatter of Q, K and V, and faster at every other cut, by up to 11x (the gradient of a fold). On a GPU it is slower
    at every cut, by 1.7x (norm, rotary and scatter of Q, K and V) to 11x (the gradient of a fold): the generated code
    finds the row of every entry anew, and the column of a table's entry in every layer.
    """
    names = ("fold_rows", "place_rows", "scatter_rows", "foreach_scatter_rows", "gather_columns")
    return {getattr(radix, name).default: getattr(reference, name) for name in names if device.type == "cpu"}
