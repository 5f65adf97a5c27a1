"""The rows of the table of ops, family by family. To support an op, add its row here.

Ops that torch tags as pointwise need a row only for facts, reach or bounds of their own. The sweep executes every row's
rule (``python -m tests.analysis.rules.sweep``).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from radix_compile.analysis import bounds, flops
from radix_compile.analysis.op_info import OP_INFO, BoundsRule, FactRule, Linear, Op, OpInfo, Rule
from radix_compile.analysis.reach import along, pointwise
from radix_compile.analysis.reach import views as reach_views
from radix_compile.analysis.reach.column_reach import ReachRule
from radix_compile.analysis.rules import (
    attention,
    contractions,
    creation,
    flex,
    indexing,
    masks,
    reductions,
    row_numbers,
    sequence,
    sorting,
    views,
)
from radix_compile.analysis.rules.elementwise import elementwise as elementwise_rule
from radix_compile.analysis.rules.row_numbers import RowNumbersRule

aten = torch.ops.aten


def each(*ops: Op, info: OpInfo) -> dict[Op, OpInfo]:
    """Return the same row for several ops."""
    return dict.fromkeys(ops, info)


def elementwise(
    *,
    fact: FactRule | None = None,
    reach: ReachRule = pointwise.elementwise_reach,
    bounds: BoundsRule | None = None,
    rows: RowNumbersRule = row_numbers.elementwise,
    linear: Linear | None = None,
    finite_at_zero: bool = False,
) -> OpInfo:
    """Return the row of an op whose results' entries are computed from the entries that line up with them."""
    return OpInfo(
        rule=elementwise_rule,
        fact=fact,
        reach=reach,
        bounds=bounds,
        row_numbers=rows,
        linear=linear,
        finite_at_zero=finite_at_zero,
        is_cheap=True,
    )


def view(
    rule: Rule,
    *,
    reach: ReachRule | None = None,
    rows: RowNumbersRule | None = None,
    shape_argument: str | None = None,
    keeps_order: bool = False,
    casts: bool = False,
    reads_layout: bool = False,
) -> OpInfo:
    """Return the row of an op that moves the entries of its first input and computes none."""
    return OpInfo(
        rule=rule,
        reach=reach,
        bounds=bounds.of_inputs,
        row_numbers=rows,
        linear="all",
        shape_argument=shape_argument,
        is_view=True,
        is_cheap=True,
        keeps_order=keeps_order,
        casts=casts,
        reads_layout=reads_layout,
    )


def product(
    rule: Rule, weight: str, contracted: int, *, reach: ReachRule | None = None, linear: Linear | None = None
) -> OpInfo:
    """Return the row of a matrix product, summed over the dimension ``contracted`` of the argument ``weight``."""
    return OpInfo(rule=rule, reach=reach, linear=linear, flops=flops.product(weight, contracted))


VIEWS: dict[Op, OpInfo] = {
    **each(
        aten.alias.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.detach.default,
        info=view(views.same_entries, reach=pointwise.same_entries, rows=row_numbers.same, keeps_order=True),
    ),
    aten.lift_fresh_copy.default: view(views.same_entries, rows=row_numbers.same),
    aten._to_copy.default: view(
        views.same_entries, reach=pointwise.same_entries, rows=row_numbers.same, keeps_order=True, casts=True
    ),
    aten.to.dtype: view(views.same_entries, rows=row_numbers.same, keeps_order=True, casts=True),
    aten.to.dtype_layout: view(views.same_entries, rows=row_numbers.same, casts=True),
    aten.type_as.default: OpInfo(
        rule=views.type_as, reach=pointwise.same_entries, row_numbers=row_numbers.same, keeps_order=True, casts=True
    ),
    **each(
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        info=view(
            views.reshape,
            reach=reach_views.reshape,
            rows=row_numbers.reshape,
            shape_argument="size",
            keeps_order=True,
        ),
    ),
    aten.expand.default: view(
        views.expand, reach=reach_views.expand, rows=row_numbers.expand, shape_argument="size", keeps_order=True
    ),
    aten.unsqueeze.default: view(
        views.unsqueeze, reach=reach_views.unsqueeze, rows=row_numbers.unsqueeze, keeps_order=True
    ),
    aten.squeeze.dim: view(views.squeeze, reach=reach_views.squeeze, rows=row_numbers.squeeze),
    aten.squeeze.dims: view(views.squeeze, reach=reach_views.squeeze, rows=row_numbers.squeeze),
    aten.permute.default: view(views.permute, reach=reach_views.permute, rows=row_numbers.permute),
    aten.transpose.int: view(views.permute, reach=reach_views.permute, rows=row_numbers.transpose),
    aten.t.default: view(views.permute, reach=reach_views.permute, rows=row_numbers.swap_last),
    aten.mT.default: view(views.permute, reach=reach_views.permute, rows=row_numbers.swap_last),
    aten.numpy_T.default: view(views.permute),
    aten.view_as_complex.default: view(views.view_as_complex, reads_layout=True),
    aten.view_as_real.default: view(views.view_as_real),
    **each(
        aten.as_strided.default,
        aten.as_strided_copy.default,
        aten.as_strided_scatter.default,
        aten.view.dtype,
        info=OpInfo(reads_layout=True),
    ),
}

PARTS: dict[Op, OpInfo] = {
    aten.slice.Tensor: OpInfo(
        rule=views.slice_,
        reach=reach_views.slice_,
        bounds=bounds.of_inputs,
        row_numbers=row_numbers.slice_,
        linear="all",
        is_cheap=True,
    ),
    aten.select.int: OpInfo(
        rule=views.select,
        reach=reach_views.select,
        bounds=bounds.of_inputs,
        row_numbers=row_numbers.select,
        linear="all",
        is_cheap=True,
    ),
    **each(
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.chunk.default,
        info=OpInfo(rule=views.split, linear="all", reach=reach_views.split),
    ),
    aten.unbind.int: OpInfo(rule=views.unbind, linear="all", reach=reach_views.unbind),
    aten.cat.default: OpInfo(rule=views.cat, linear="all", reach=reach_views.cat, bounds=bounds.of_inputs),
    aten.stack.default: OpInfo(rule=views.stack, linear="all", bounds=bounds.of_inputs),
    aten.repeat.default: OpInfo(rule=views.repeat, linear="all", bounds=bounds.of_inputs),
    aten.repeat_interleave.self_int: OpInfo(
        rule=views.repeat_interleave, linear="all", reach=reach_views.repeat_interleave
    ),
    aten.flip.default: OpInfo(rule=views.flip, linear="all", reach=reach_views.flip),
    aten.constant_pad_nd.default: OpInfo(rule=views.pad, reach=reach_views.pad),
    aten.pad.default: OpInfo(rule=views.pad, reach=reach_views.pad),
    aten.slice_scatter.default: OpInfo(rule=views.slice_scatter, reach=reach_views.written_over),
    aten.select_scatter.default: OpInfo(reach=reach_views.written_over),
}

ELEMENTWISE: dict[Op, OpInfo] = {
    torch.Tag.pointwise: elementwise(),
    # Torch does not tag these as pointwise.
    **each(
        aten.__and__.Scalar,
        aten.__or__.Scalar,
        aten.__xor__.Tensor,
        aten.polar.default,
        aten.softplus.default,
        info=elementwise(),
    ),
    aten.complex.default: elementwise(linear="all"),
    # Comparisons of columns, and masks made from them.
    aten.le.Tensor: elementwise(fact=partial(masks.compare, sign=1, slack=0)),
    aten.lt.Tensor: elementwise(fact=partial(masks.compare, sign=1, slack=-1)),
    aten.ge.Tensor: elementwise(fact=partial(masks.compare, sign=-1, slack=0)),
    aten.gt.Tensor: elementwise(fact=partial(masks.compare, sign=-1, slack=-1)),
    aten.le.Scalar: elementwise(fact=partial(masks.compare_distance, sign=1, slack=0)),
    aten.lt.Scalar: elementwise(fact=partial(masks.compare_distance, sign=1, slack=-1)),
    aten.ge.Scalar: elementwise(fact=partial(masks.compare_distance, sign=-1, slack=0)),
    aten.gt.Scalar: elementwise(fact=partial(masks.compare_distance, sign=-1, slack=-1)),
    aten.eq.Tensor: elementwise(fact=masks.eq),
    aten.eq.Scalar: elementwise(fact=masks.eq_scalar),
    aten.ne.Scalar: elementwise(fact=masks.ne_scalar),
    aten.__and__.Tensor: elementwise(fact=masks.and_),
    aten.bitwise_and.Tensor: elementwise(fact=masks.and_),
    aten.logical_and.default: elementwise(fact=masks.and_),
    aten.__or__.Tensor: elementwise(fact=masks.or_),
    aten.bitwise_or.Tensor: elementwise(fact=masks.or_),
    aten.logical_or.default: elementwise(fact=masks.or_),
    aten.bitwise_not.default: elementwise(fact=masks.not_),
    aten.logical_not.default: elementwise(fact=masks.not_),
    aten.where.self: elementwise(fact=masks.where, reach=pointwise.where, rows=row_numbers.hide),
    aten.where.ScalarOther: elementwise(fact=masks.where, reach=pointwise.where, rows=row_numbers.hide),
    aten.where.ScalarSelf: elementwise(fact=masks.where, reach=pointwise.where, rows=row_numbers.hide),
    aten.where.Scalar: elementwise(fact=masks.where),
    aten.masked_fill.Scalar: elementwise(fact=masks.masked_fill, reach=pointwise.masked_fill, rows=row_numbers.hide),
    # Arithmetic.
    aten.add.Tensor: elementwise(
        linear="all", fact=masks.add, reach=pointwise.total, bounds=bounds.total, finite_at_zero=True
    ),
    aten.sub.Tensor: elementwise(
        linear="all", fact=masks.sub, reach=pointwise.total, bounds=bounds.difference, finite_at_zero=True
    ),
    aten.rsub.Scalar: elementwise(bounds=bounds.difference_reversed, finite_at_zero=True),
    aten.mul.Tensor: elementwise(
        linear="each",
        fact=masks.and_,
        reach=pointwise.product,
        bounds=bounds.product,
        rows=row_numbers.hide,
        finite_at_zero=True,
    ),
    aten.mul.Scalar: elementwise(linear="first", fact=masks.scale, bounds=bounds.product, finite_at_zero=True),
    aten.div.Tensor: elementwise(linear="first", fact=masks.scale, reach=pointwise.quotient, bounds=bounds.quotient),
    aten.div.Scalar: elementwise(linear="first", fact=masks.scale, finite_at_zero=True),
    aten.neg.default: elementwise(linear="all", reach=pointwise.negative, bounds=bounds.negative, finite_at_zero=True),
    aten.reciprocal.default: elementwise(bounds=bounds.reciprocal),
    aten.pow.Tensor_Tensor: elementwise(bounds=bounds.power),
    aten.pow.Tensor_Scalar: elementwise(bounds=bounds.power),
    aten.pow.Scalar: elementwise(bounds=bounds.power),
    aten.exp.default: elementwise(reach=pointwise.exp),
    aten.maximum.default: elementwise(fact=masks.maximum),
    aten.max.other: elementwise(fact=masks.maximum),
    aten.tanh.default: elementwise(fact=masks.tanh, finite_at_zero=True),
    # The operand may be the sorted order of rows.
    aten.floor_divide.default: OpInfo(rule=sorting.floor_divide, takes_arrangements=True),
}

CREATION: dict[Op, OpInfo] = {
    **each(aten.arange.default, aten.arange.start, aten.arange.start_step, info=OpInfo(rule=creation.arange)),
    **each(
        aten.full.default,
        aten.zeros.default,
        aten.ones.default,
        aten.scalar_tensor.default,
        aten.new_full.default,
        aten.new_zeros.default,
        aten.new_ones.default,
        aten.empty.memory_format,
        aten.new_empty.default,
        info=OpInfo(rule=creation.fill, takes_mixed=True),
    ),
    aten.full_like.default: OpInfo(rule=creation.fill_like),
    aten.ones_like.default: OpInfo(rule=creation.fill_like),
    aten.zeros_like.default: OpInfo(rule=creation.fill_like, reach=pointwise.zeros_like),
    aten.empty_like.default: OpInfo(rule=sorting.empty_like, takes_arrangements=True),
    aten.tril.default: OpInfo(rule=creation.triangle, reach=along.triangle),
    aten.triu.default: OpInfo(rule=creation.triangle, reach=along.triangle),
}

REDUCTIONS: dict[Op, OpInfo] = {
    **each(
        aten.sum.dim_IntList,
        aten.mean.dim,
        aten.amax.default,
        aten.amin.default,
        info=OpInfo(rule=reductions.reduce, reach=along.reduce, row_numbers=row_numbers.reduce),
    ),
    **each(
        aten.max.dim,
        aten.min.dim,
        aten.argmax.default,
        aten.argmin.default,
        aten.any.dim,
        aten.all.dim,
        aten.prod.dim_int,
        aten.logsumexp.default,
        aten.var.correction,
        aten.std.correction,
        aten.linalg_vector_norm.default,
        aten.norm.ScalarOpt_dim,
        info=OpInfo(rule=reductions.reduce),
    ),
    **each(
        aten.mean.default,
        aten.sum.default,
        aten.max.default,
        aten.min.default,
        aten.any.default,
        aten.all.default,
        info=OpInfo(rule=reductions.reduce_all),
    ),
    aten.softmax.int: OpInfo(rule=reductions.softmax, reach=along.softmax, row_numbers=row_numbers.along),
    aten._softmax.default: OpInfo(rule=reductions.softmax),
    aten.log_softmax.int: OpInfo(rule=reductions.along, row_numbers=row_numbers.along),
    aten.topk.default: OpInfo(rule=reductions.along),
    **each(
        aten.layer_norm.default,
        aten.native_layer_norm.default,
        aten.rms_norm.default,
        info=OpInfo(rule=reductions.layer_norm),
    ),
}

CONTRACTIONS: dict[Op, OpInfo] = {
    aten.linear.default: product(contractions.linear, "weight", -1, reach=along.linear),
    aten.mm.default: product(contractions.mm, "mat2", 0, reach=along.matmul, linear="each"),
    aten.bmm.default: product(contractions.bmm, "mat2", -2, reach=along.matmul, linear="each"),
    aten.matmul.default: product(contractions.matmul, "other", -2, reach=along.matmul, linear="each"),
    aten.addmm.default: product(contractions.addmm, "mat2", 0),
    aten.baddbmm.default: product(contractions.baddbmm, "batch2", -2),
    aten.einsum.default: OpInfo(rule=contractions.einsum, linear="each", reach=along.einsum, flops=flops.equation),
    aten.linalg_solve_triangular.default: OpInfo(reach=along.solve_triangular),
    aten.conv1d.default: OpInfo(reach=along.conv1d),
}

ATTENTION: dict[Op, OpInfo] = {
    aten.scaled_dot_product_attention.default: OpInfo(
        rule=attention.scaled_dot_product_attention, flops=flops.attention
    ),
    flex.FLEX: OpInfo(rule=flex.flex_attention, flops=flops.flex_attention),
    aten._transformer_encoder_layer_fwd.default: OpInfo(rule=attention.fused_encoder_layer),
}

INDEXING: dict[Op, OpInfo] = {
    aten.embedding.default: OpInfo(rule=indexing.embedding),
    aten.gather.default: OpInfo(rule=indexing.gather, linear="first", row_numbers=row_numbers.gather),
    **each(
        aten.scatter.value,
        aten.scatter.src,
        aten.scatter_add.default,
        info=OpInfo(rule=indexing.gather),
    ),
    aten.index_select.default: OpInfo(rule=indexing.index_select, linear="first", row_numbers=row_numbers.index_select),
    aten.index.Tensor: OpInfo(
        rule=indexing.index, linear="first", row_numbers=row_numbers.index, takes_arrangements=True
    ),
    aten.index_put.default: OpInfo(rule=sorting.index_put, takes_arrangements=True),
}

LOSSES: dict[Op, OpInfo] = {
    **each(
        aten.cross_entropy_loss.default,
        aten.nll_loss.default,
        aten.nll_loss_nd.default,
        info=OpInfo(row_numbers=row_numbers.cross_entropy),
    ),
}

SORTING: dict[Op, OpInfo] = {
    **each(
        aten.sort.default,
        aten.sort.stable,
        aten.argsort.default,
        info=OpInfo(rule=sorting.sort, takes_arrangements=True),
    ),
    aten.histc.default: OpInfo(rule=sorting.histc),
    # transformers registers an op of its own for devices without torch's, after this module is imported.
    **each(
        "aten::_grouped_mm",
        "transformers::grouped_mm_fallback",
        info=OpInfo(rule=sorting.grouped_mm, flops=flops.grouped_product, takes_arrangements=True),
    ),
}

SEQUENCE: dict[Op, OpInfo] = {
    aten.cumsum.default: OpInfo(rule=sequence.cumulative, reach=along.cumsum, takes_arrangements=True),
    aten.cumprod.default: OpInfo(rule=sequence.cumulative, takes_arrangements=True),
    aten.diff.default: OpInfo(rule=sequence.diff, takes_mixed=True),
    aten.dropout.default: OpInfo(rule=sequence.dropout, row_numbers=row_numbers.same),
    **each(
        aten.native_dropout.default,
        aten.feature_dropout.default,
        info=OpInfo(rule=sequence.dropout),
    ),
}

FAMILIES: tuple[Mapping[Op, OpInfo], ...] = (
    VIEWS,
    PARTS,
    ELEMENTWISE,
    CREATION,
    REDUCTIONS,
    CONTRACTIONS,
    ATTENTION,
    INDEXING,
    LOSSES,
    SORTING,
    SEQUENCE,
)

for family in FAMILIES:
    OP_INFO.update(family)
