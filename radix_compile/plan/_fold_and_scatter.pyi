from typing import SupportsIndex, TypeAlias

import numpy as np
from numpy.typing import NDArray

_UInt32: TypeAlias = NDArray[np.uint32]

def fold_and_scatter(
    input_ids: object,
    position_ids: object,
    cu_seq_lengths: object,
    pad_multiple_of: SupportsIndex | None,
    /,
) -> tuple[_UInt32, _UInt32, _UInt32, _UInt32] | None: ...
