"""The kernels compile for a GPU that need not be there: the interpreter takes much that the compiler does not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="needs Triton")

PROGRAM = '''
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from radix_compile.kernels import tree_attention, triton_attention, triton_attention_backward
from radix_compile.kernels import triton_nll, triton_rows, triton_sums, triton_tree
from radix_compile.kernels.tree_arguments import ScoreOptions, TreeArrays
from radix_compile.kernels.triton_launch import Kernel
from radix_compile.plan.prefix_plan import PrefixPlan
from radix_compile.plan.triton_tiles import triton_tiles
from tests.kernels.plans import tree, values

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float64: "fp64"}
NAMES |= {torch.uint8: "u8", torch.int64: "i64", torch.bool: "i1"}
KERNELS = ("_copy_rows", "_sum_rows", "_long_sums", "_sum_same_target", "_forward", "_backward_query", "_backward_key")
compiled = []


def signature(value):
    if isinstance(value, tuple):
        return tuple(map(signature, value))
    if isinstance(value, torch.Tensor):
        return "*" + NAMES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "constexpr" if value is None or value == 1 else "i64"


def constants(value, path):
    if isinstance(value, tuple):
        return {key: found for i, one in enumerate(value) for key, found in constants(one, (*path, i)).items()}
    return {path: value} if signature(value) == "constexpr" else {}


def divisible(value):
    """As a launch finds out, and as loads have to be to run ahead of their use."""
    return isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0)


class Compiled:
    """In place of a kernel: a launch compiles it for the arguments, as the first launch on a GPU would."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.compile

    @property
    def arg_names(self):
        return self.kernel.arg_names

    def compile(self, *args, num_warps=4, num_stages=3, **keywords):
        names = self.kernel.arg_names
        types = dict.fromkeys(names, "constexpr") | {name: signature(arg) for name, arg in zip(names, args)}
        fixed = {(names.index(name),): value for name, value in keywords.items()}
        for i, arg in enumerate(args):
            fixed |= constants(arg, (i,))
        whole = {(i,): [["tt.divisibility", 16]] for i, arg in enumerate(args) if divisible(arg)}
        source = ASTSource(fn=self.kernel, signature=types, constexprs=fixed, attrs=whole)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        if "E" in keywords:
            assert result.metadata.shared <= room, (self.kernel.__name__, result.metadata.shared, room)
        assert "ld.global" in result.asm["ptx"]
        compiled.append(self.kernel.__name__)


for module in (triton_rows, triton_sums, triton_nll, triton_attention, triton_attention_backward):
    for name, kernel in list(vars(module).items()):
        if isinstance(kernel, Kernel):
            kernel.function = Compiled(kernel.function)
        elif isinstance(kernel, triton.JITFunction) and name in KERNELS:
            setattr(module, name, Compiled(kernel))

for batch, seq in ((3, 4), (250, 5)):
    plan = tree(batch, seq)
    lists = plan.lists
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        q, k = values((batch, seq, 4, 8), dtype).transpose(1, 2), values((batch, 2, seq, 8), dtype)
        wide = values((batch, seq, 3001), dtype)
        triton_sums.foreach_sum_rows([q, k], *lists, [0, 0], [2, 2])
        triton_sums.foreach_sum_rows([wide], *lists, [0], [1])
        triton_rows.fold_rows(wide, plan.fold, plan.scatter, 0, 1)
        triton_rows.place_rows(values((1, plan.nodes, 1), dtype), plan.fold, plan.scatter, batch, seq, 0, 1)
        nodes = [values((1, 4, plan.nodes, 8), dtype), values((1, 2, plan.nodes, 8), dtype)]
        triton_rows.foreach_scatter_rows(nodes, *lists, batch, seq, [0, 0], [2, 2], False)
    triton_rows.fold_rows(values((batch, seq, 3), torch.bool), plan.fold, plan.scatter, 0, 1)
    triton_rows.gather_columns(values((1, 8, seq), torch.float32), plan.fold, plan.scatter, batch, seq, 2)
    grad = values((batch * seq,), torch.float32)
    triton_nll.sum_same_target(grad, plan.scatter, plan.scatter, plan.rows, plan.starts)

plan = PrefixPlan.from_rows(torch.randint(0, 3, (30, 9)))
begin, end = plan.tree()
arrays = {"fold": plan.fold, "scatter": plan.scatter, "begin": begin, "end": end}
arrays |= triton_tiles(plan, begin, end).by_name()
arrays = TreeArrays(**{name: torch.from_numpy(one) for name, one in arrays.items()})
biases = [None, values((1, 4, 9, 9), torch.float32), values((30, 1, 9, 9), torch.float32) > 0]
triton_tree.room = lambda query: room
least = tree_attention.SHARED_MEMORY
for dtype, size, sinks, bias, carried, rooms in (
    (torch.bfloat16, 128, False, biases[0], (None, None), (227 * 1024, 75 * 1024, least[256])),
    (torch.bfloat16, 128, True, biases[1], (None, 30.0), (75 * 1024,)),
    (torch.bfloat16, 192, True, biases[0], (9, 30.0), (137 * 1024,)),
    (torch.bfloat16, 192, False, biases[2], (9, None), (least[512],)),
    (torch.float32, 64, False, biases[0], (None, None), (least[256],)),
):
    shapes = (4, size), (2, size), (2, min(size, 128))
    q, k, v = (values((1, len(plan.fold), *shape), dtype).transpose(1, 2) for shape in shapes)
    about = ScoreOptions(values((4,), dtype) if sinks else None, bias, 0.3, *carried)
    for room in rooms:
        result, total = triton_attention.tree_attention(q, k, v, arrays, about)
        triton_attention_backward.tree_attention_backward(result, q, k, v, result, total, arrays, about)
print(sorted(set(compiled)))
'''


@pytest.mark.slow  # the interpreter runs the same kernels by default; this compiles them for a GPU, in 20 s
def test_every_kernel_compiles() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = (
        "_backward_key",
        "_backward_query",
        "_copy_rows",
        "_forward",
        "_long_sums",
        "_sum_rows",
        "_sum_same_target",
    )
    assert done.stdout.strip() == str(list(compiled))
