"""The samples of every row of the rule table, a file for each family of rules."""

from __future__ import annotations

import torch

from radix_compile.testing import Sample
from radix_compile.torch_internals import OpOverload
from tests.analysis.rules.samples.contractions import CONTRACTIONS
from tests.analysis.rules.samples.creation import CREATION
from tests.analysis.rules.samples.elementwise import ELEMENTWISE, POINTWISE
from tests.analysis.rules.samples.indexing import INDEXING
from tests.analysis.rules.samples.reductions import REDUCTIONS
from tests.analysis.rules.samples.sequence import SEQUENCE
from tests.analysis.rules.samples.sorting import SORTING
from tests.analysis.rules.samples.views import VIEWS

__all__ = ["NEVER_FOLDS", "NEVER_REFUSED", "NO_RULE", "POINTWISE", "SAMPLES", "Sample"]

aten = torch.ops.aten

SAMPLES: dict[OpOverload | str, list[Sample]] = {
    **CONTRACTIONS,
    **ELEMENTWISE,
    **CREATION,
    **INDEXING,
    **SORTING,
    **REDUCTIONS,
    **SEQUENCE,
    **VIEWS,
}

NO_RULE: dict[str, str] = {
    "aten.conv1d.default": "causal or not by its padding: column_reach says which",
    "aten.cross_entropy_loss.default": "a loss over all rows, which the pass fold_cross_entropy is for",
    "aten.linalg_solve_triangular.default": "solves over the columns of a chunk: column_reach says which it reads",
    "aten.select_scatter.default": "writes column by column: column_reach follows them",
}
"""Ops that models use at which folding stops by intention, and why."""

NEVER_FOLDS = {aten.native_dropout.default, aten._transformer_encoder_layer_fwd.default}
"""Rows that only give their refusal a reason."""

NEVER_REFUSED = {
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.full.default,
    aten.zeros.default,
    aten.ones.default,
    aten.scalar_tensor.default,
    aten.new_full.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_empty.default,
    aten.empty.memory_format,
}
"""Rows that read no rows."""
