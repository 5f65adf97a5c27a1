"""Rules for ops that are not torch's: what a library's own kernels do to the rows of a batch."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from radix_compile.analysis.arguments import tensor_inputs
from radix_compile.analysis.op_info import OP_INFO, OpInfo, Rule
from radix_compile.analysis.rules.elementwise import lined_up
from radix_compile.ir.axes import Layout, Mixes, as_size, feature, plain_axis
from radix_compile.ir.errors import RefusalCode
from radix_compile.ir.value import Marks, Value, value_of
from radix_compile.plan.arrays import describe
from radix_compile.torch_internals import OpOverload, val


def register_rule(op: OpOverload, rule: str | Rule) -> None:
    """Say what an op does to the rows of a batch, so that folding does not stop at it.

    It is taken at its word: a wrong rule gives wrong numbers. So does an op whose gradient is not linear in the one
    that comes in, since rows of equal path are given the sum of theirs. Rules count for what is compiled after this
    call.

    Args:
        op: an overload, such as ``torch.ops.mylib.fused_norm.default``; one that writes to its inputs cannot have a
            rule.
        rule: what the op does:

            - ``"pointwise"``: each entry of its results reads the entries of its tensors that line up with it, as in
              broadcasting.
            - ``"rowwise"``: its results are shaped like its first tensor up to the last dimension, each entry reads
              its own row of that tensor along the last dimension, and the other tensors are weights (a norm, a
              projection, a quantised product).
            - ``"causal"``: its tensors are ``[batch, sequence, ...]`` and so are its results; each row of these reads
              that row and earlier ones of its own sequence, and other tensors are weights (a scan, a short
              convolution). It runs on all rows; what follows can fold.
            - or a function ``(node, layout) -> Value``: see the page "Add an op in ten minutes".

    Raises:
        TypeError: `op` is not an overload, or `rule` neither a name nor a function.
        ValueError: `op` writes to an input, has a rule, or `rule` is not one of the names.
    """
    if not isinstance(op, OpOverload):
        raise TypeError(f"op must be an overload such as torch.ops.mylib.norm.default, got {describe(op)}")
    if op._schema.is_mutable:
        raise ValueError(f"op must not write to its inputs, but {op} does")
    row = OP_INFO.get(op) or OP_INFO.get(op.name(), OpInfo())
    if row.rule is not None:
        raise ValueError(f"op has a rule already: {op}")
    if isinstance(rule, str):
        if rule not in KINDS:
            raise ValueError(f"rule must be one of {', '.join(map(repr, KINDS))} or a function, got {rule!r}")
        rule = KINDS[rule]
    elif not callable(rule):
        raise TypeError(f"rule must be a name or a function, got {describe(rule)}")
    OP_INFO[op] = replace(row, rule=rule)


def _pointwise(node: fx.Node, layout: Layout) -> Marks:
    axes, uses = lined_up(node, layout)
    return _each(node, Value(axes, operands=uses))


def _rowwise(node: fx.Node, layout: Layout) -> Marks:
    source, *weights = tensor_inputs(node)
    _constant(weights)
    axes = value_of(source).axes
    feature(axes[-1], "reads along")
    return _each(node, Value(axes), last_differs=True)


def _causal(node: fx.Node, layout: Layout) -> Marks:
    rows = [one for one in tensor_inputs(node) if value_of(one).is_row]
    _constant([one for one in tensor_inputs(node) if one not in rows])
    if not rows:
        raise Mixes("none of its tensors has one entry for each row", RefusalCode.CUSTOM_RULE)
    for one in rows:
        if value_of(one).axes[:2] != layout.rows:
            raise Mixes("its tensors are not [batch, sequence, ...]", RefusalCode.CUSTOM_RULE)
        if value_of(one).fully_masked:
            raise Mixes("reads rows that saw no key in an earlier layer", RefusalCode.ROWS_WITHOUT_KEYS)
    outputs = val(node)
    shapes = [one.shape for one in outputs] if isinstance(outputs, tuple | list) else [outputs.shape]
    features = [tuple(plain_axis(as_size(size)) for size in shape[2:]) for shape in shapes]
    values = [Value((*layout.rows, *axes), full_only=True) for axes in features]
    return tuple(values) if isinstance(outputs, tuple | list) else values[0]


KINDS: dict[str, Rule] = {"pointwise": _pointwise, "rowwise": _rowwise, "causal": _causal}


def _constant(nodes: list[fx.Node]) -> None:
    if not all(value_of(node).is_constant for node in nodes):
        raise Mixes("the weights differ from row to row", RefusalCode.DIFFERS_BY_ROW)


def _each(node: fx.Node, value: Value, last_differs: bool = False) -> Marks:
    """The value for each result, with a last dimension of its own size."""

    def of(shape: tuple[int, ...]) -> Value:
        axes = (*value.axes[:-1], plain_axis(as_size(shape[-1]))) if last_differs else value.axes
        if len(axes) != len(shape):
            raise Mixes("its results are not shaped as its rule says", RefusalCode.CUSTOM_RULE)
        return Value(axes, operands=value.operands)

    outputs = val(node)
    return tuple(of(one.shape) for one in outputs) if isinstance(outputs, tuple | list) else of(outputs.shape)
