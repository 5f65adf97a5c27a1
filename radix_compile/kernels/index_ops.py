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

from radix_compile.ir.calls import parameters
from radix_compile.ir.plan_arrays import schema
from radix_compile.kernels import reference
from radix_compile.kernels.row_layout import empty_rows

radix = torch.ops.radix

LISTS = ("fold", "rows", "starts", "pieces")
"""The arrays that a sum over the rows of each node takes, and so the gradient of a scatter."""

_PLAN = schema(["fold", "scatter"])
_LISTS = schema(["scatter", *LISTS])
_MAYBE_LISTS = f"Tensor scatter, {schema(LISTS, optional=['always', 'lists'])}"
_FULL = "SymInt batch, SymInt seq"
_AXES = "int batch_dim, int seq_dim"
_EACH = "int[] batch_dims, int[] seq_dims"
_SCHEMAS = (
    f"fold_rows(Tensor full, {_PLAN}, {_AXES}) -> Tensor",
    f"place_rows(Tensor compact, {_PLAN}, {_FULL}, {_AXES}) -> Tensor",
    f"scatter_rows(Tensor compact, {_MAYBE_LISTS}, {_FULL}, {_AXES}, bool holes) -> Tensor",
    f"sum_rows(Tensor full, {_LISTS}, {_AXES}) -> Tensor",
    f"foreach_scatter_rows(Tensor[] compact, {_MAYBE_LISTS}, {_FULL}, {_EACH}, bool holes) -> Tensor[]",
    f"foreach_sum_rows(Tensor[] full, {_LISTS}, {_EACH}) -> Tensor[]",
    f"gather_columns(Tensor table, {_PLAN}, {_FULL}, int dim) -> Tensor",
)

# ---------------------------------------------------------------------------------------------------------- which code


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _run(name: str, moved: Any, *args: Any) -> Any:
    """The op by its Triton kernel, if there is one for these tensors."""
    tensors: Sequence[Tensor] = [moved] if isinstance(moved, Tensor) else moved
    if has_triton() and all(tensor.is_cuda for tensor in tensors):
        from radix_compile.kernels import triton_rows, triton_sums

        sums = name == "foreach_sum_rows"
        if all(tensor.dtype in (triton_rows.FLOATS if sums else triton_rows.DTYPES) for tensor in tensors):
            return getattr(triton_sums if sums else triton_rows, name)(moved, *args)
    return getattr(reference, name)(moved, *args)


def _scatter_rows(
    compact: Tensor,
    scatter: Tensor,
    fold: Tensor | None,
    rows: Tensor | None,
    starts: Tensor | None,
    pieces: Tensor | None,
    batch: int,
    seq: int,
    batch_dim: int,
    seq_dim: int,
    holes: bool,
) -> Tensor:
    plan = scatter, fold, rows, starts, pieces
    moved: list[Tensor] = _run("foreach_scatter_rows", [compact], *plan, batch, seq, [batch_dim], [seq_dim], holes)
    return moved[0]


def _sum_rows(
    full: Tensor,
    scatter: Tensor,
    fold: Tensor,
    rows: Tensor,
    starts: Tensor,
    pieces: Tensor,
    batch_dim: int,
    seq_dim: int,
) -> Tensor:
    sums: list[Tensor] = _run("foreach_sum_rows", [full], scatter, fold, rows, starts, pieces, [batch_dim], [seq_dim])
    return sums[0]


_OF_ONE: dict[str, Callable[..., Tensor]] = {"scatter_rows": _scatter_rows, "sum_rows": _sum_rows}
"""The ops that move one tensor by the code that moves several."""

# ----------------------------------------------------------------------------------------------- shapes and strides


def _fake_fold_rows(given: dict[str, Any]) -> Tensor:
    return empty_rows(given["full"], 1, given["fold"].shape[0], given["batch_dim"], given["seq_dim"])


def _fake_scatter_rows(given: dict[str, Any]) -> Tensor:
    return empty_rows(given["compact"], given["batch"], given["seq"], given["batch_dim"], given["seq_dim"])


def _fake_foreach_scatter_rows(given: dict[str, Any]) -> list[Tensor]:
    each = zip(given["compact"], given["batch_dims"], given["seq_dims"], strict=True)
    return [empty_rows(one, given["batch"], given["seq"], *dims) for one, *dims in each]


def _fake_foreach_sum_rows(given: dict[str, Any]) -> list[Tensor]:
    each = zip(given["full"], given["batch_dims"], given["seq_dims"], strict=True)
    return [empty_rows(one, 1, given["fold"].shape[0], *dims) for one, *dims in each]


def _fake_gather_columns(given: dict[str, Any]) -> Tensor:
    return empty_rows(given["table"].unsqueeze(0), 1, given["fold"].shape[0], 0, given["dim"] + 1).squeeze(0)


_FAKES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "fold_rows": _fake_fold_rows,
    "place_rows": _fake_scatter_rows,
    "scatter_rows": _fake_scatter_rows,
    "sum_rows": _fake_fold_rows,
    "foreach_scatter_rows": _fake_foreach_scatter_rows,
    "foreach_sum_rows": _fake_foreach_sum_rows,
    "gather_columns": _fake_gather_columns,
}


# ---------------------------------------------------------------------------------------------------------- gradients


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any, names: Sequence[str]) -> None:
    """Keep what a gradient needs, by name: the plan and sizes, never a row."""
    first = inputs[0] if isinstance(inputs[0], Tensor) else inputs[0][0]
    ctx.first_shape = first.shape
    rest = dict(zip(names[1:], inputs[1:], strict=True))
    ctx.plan = [name for name, value in rest.items() if value is None or isinstance(value, Tensor)]
    ctx.save_for_backward(*(rest[name] for name in ctx.plan))
    ctx.numbers = {name: value for name, value in rest.items() if name not in ctx.plan}


def _kept(ctx: Any) -> dict[str, Any]:
    return {**dict(zip(ctx.plan, ctx.saved_tensors, strict=True)), **ctx.numbers}


def _result(ctx: Any, gradient: Any) -> tuple[Any, ...]:
    """The gradients of all arguments: the others have none."""
    return (gradient, *[None] * (len(ctx.plan) + len(ctx.numbers)))


def _sizes(ctx: Any, batch_dim: int, seq_dim: int) -> dict[str, Any]:
    return {"batch": ctx.first_shape[batch_dim], "seq": ctx.first_shape[seq_dim]}


def _fold_rows_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    kept = _kept(ctx)
    sizes = _sizes(ctx, kept["batch_dim"], kept["seq_dim"])
    return _result(ctx, _call("place_rows", compact=grad, **kept, **sizes))


def _place_rows_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _result(ctx, _call("fold_rows", full=grad, **_kept(ctx)))


def _scatter_rows_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _result(ctx, _call("sum_rows", full=grad, **_with_lists(_kept(ctx))))


def _foreach_scatter_rows_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    """Integers and bools that move along have no gradient, but get one here."""
    kept = _with_lists(_kept(ctx))
    moved = [grad.is_floating_point() or grad.is_complex() for grad in grads]
    full, kept["batch_dims"], kept["seq_dims"] = (
        list(itertools.compress(values, moved)) for values in (grads, kept["batch_dims"], kept["seq_dims"])
    )
    sums = iter(_call("foreach_sum_rows", full=full, **kept))
    return _result(ctx, [next(sums) if one else None for one in moved])


def _with_lists(kept: dict[str, Any]) -> dict[str, Any]:
    if any(kept[name] is None for name in LISTS):
        raise RuntimeError("the gradient of scatter_rows needs lists: pass `fold`, `rows`, `starts` and `pieces`")
    return kept


def _sum_rows_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    kept = _kept(ctx)
    sizes = _sizes(ctx, kept["batch_dim"], kept["seq_dim"])
    return _result(ctx, _call("scatter_rows", compact=grad, holes=True, **kept, **sizes))


def _foreach_sum_rows_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    kept = _kept(ctx)
    sizes = _sizes(ctx, kept["batch_dims"][0], kept["seq_dims"][0])
    return _result(ctx, _call("foreach_scatter_rows", compact=grads, holes=True, **kept, **sizes))


def _gather_columns_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    kept = _kept(ctx)
    # Each row is placed at its own column, so the sum over sequences is the sum over the nodes of a column.
    full = _call("place_rows", compact=grad.unsqueeze(0), batch_dim=0, seq_dim=kept["dim"] + 1, **kept)
    return _result(ctx, full.sum(0))


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
_NAMES: dict[str, list[str]] = {}
"""The names of the arguments of each op."""


def _call(op: str, **given: Any) -> Any:
    """Call one of the ops with what it takes of ``given``."""
    return getattr(radix, op)(*(given[name] for name in _NAMES[op]))


def _fake(op: str, *given: Any) -> Any:
    return _FAKES[op](dict(zip(_NAMES[op], given, strict=True)))


for _schema in _SCHEMAS:
    _name = _schema.split("(")[0]
    library.define(_schema)
    _NAMES[_name] = parameters(getattr(radix, _name).default)
    library.impl(_name, _OF_ONE.get(_name) or functools.partial(_run, _name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"radix::{_name}", functools.partial(_fake, _name), lib=library)
    _setup = functools.partial(_keep, names=_NAMES[_name])
    torch.library.register_autograd(f"radix::{_name}", _BACKWARDS[_name], setup_context=_setup, lib=library)


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
