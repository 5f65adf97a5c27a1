"""Rules for ops of other packages: whether a library's kernels are position-wise or causal."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from radix_compile.analysis.arguments import tensor_inputs
from radix_compile.analysis.op_info import OP_INFO, OpInfo, Rule
from radix_compile.analysis.rules.elementwise import broadcast_inputs
from radix_compile.ir.axes import Layout, Mixes, as_size, feature, plain_axis
from radix_compile.ir.errors import RefusalCode
from radix_compile.ir.value import Marks, Value, value_of
from radix_compile.plan.arrays import describe
from radix_compile.torch_internals import OpOverload, val


def register_rule(op: OpOverload, rule: str | Rule) -> None:
    """Declare how an op reads the rows of a batch, so that folding does not stop at the op.

    The rule is trusted: a wrong rule gives wrong numbers. The op's gradient must be linear in the incoming gradient,
    because rows of equal paths get the sum of their gradients. A rule applies to graphs compiled after this call.

    Args:
        op: an overload, such as ``torch.ops.mylib.fused_norm.default``. It must not write to its inputs.
        rule: how the op reads rows:

            - ``"pointwise"``: each entry of the results reads the entries of the input tensors that line up with it,
              by broadcasting.
            - ``"rowwise"``: the results have the shape of the first tensor except for the last dimension, each entry
              reads its own row of that tensor along the last dimension, and the other tensors are weights (a norm, a
              projection, a quantised product).
            - ``"causal"``: the input tensors and the results are ``[batch, sequence, ...]``; each row of the results
              reads the same row and earlier rows of its own sequence, and other tensors are weights (a scan, a short
              convolution). The op runs in full form; ops after it can fold.
            - a function ``(node, layout) -> Value``: see the page "Add an op in ten minutes".

    Raises:
        TypeError: `op` is not an overload, or `rule` is neither a name nor a function.
        ValueError: `op` writes to an input or already has a rule, or `rule` is an unknown name.
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
    axes, uses = broadcast_inputs(node, layout)
    return _each(node, Value(axes, operands=uses))


def _rowwise(node: fx.Node, layout: Layout) -> Marks:
    source, *weights = tensor_inputs(node)
    _require_constant(weights)
    axes = value_of(source).axes
    feature(axes[-1], "reads along")
    return _each(node, Value(axes), last_differs=True)


def _causal(node: fx.Node, layout: Layout) -> Marks:
    rows = [tensor for tensor in tensor_inputs(node) if value_of(tensor).is_row]
    _require_constant([tensor for tensor in tensor_inputs(node) if tensor not in rows])
    if not rows:
        raise Mixes("none of its tensors has one entry for each row", RefusalCode.CUSTOM_RULE)
    for tensor in rows:
        if value_of(tensor).axes[:2] != layout.rows:
            raise Mixes("its tensors are not [batch, sequence, ...]", RefusalCode.CUSTOM_RULE)
        if value_of(tensor).fully_masked:
            raise Mixes("reads rows that are fully masked in an earlier layer", RefusalCode.ROWS_WITHOUT_KEYS)
    outputs = val(node)
    shapes = [output.shape for output in outputs] if isinstance(outputs, tuple | list) else [outputs.shape]
    features = [tuple(plain_axis(as_size(size)) for size in shape[2:]) for shape in shapes]
    values = [Value((*layout.rows, *axes), full_only=True) for axes in features]
    return tuple(values) if isinstance(outputs, tuple | list) else values[0]


KINDS: dict[str, Rule] = {"pointwise": _pointwise, "rowwise": _rowwise, "causal": _causal}


def _require_constant(nodes: list[fx.Node]) -> None:
    """Raise :class:`Mixes` unless the weights are the same for all rows."""
    if not all(value_of(node).is_constant for node in nodes):
        raise Mixes("the weights differ from row to row", RefusalCode.DIFFERS_BY_ROW)


def _each(node: fx.Node, value: Value, last_differs: bool = False) -> Marks:
    """Return the value for each result; with ``last_differs`` the last dimension has the result's own size."""

    def with_shape(shape: tuple[int, ...]) -> Value:
        axes = (*value.axes[:-1], plain_axis(as_size(shape[-1]))) if last_differs else value.axes
        if len(axes) != len(shape):
            raise Mixes("the shapes of its results do not match its rule", RefusalCode.CUSTOM_RULE)
        return Value(axes, operands=value.operands)

    outputs = val(node)
    if isinstance(outputs, tuple | list):
        return tuple(with_shape(output.shape) for output in outputs)
    return with_shape(outputs.shape)
