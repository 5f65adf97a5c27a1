"""The inputs of a call, on their device and on the host, where the plan of the call is made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


class CallInputs(Sequence[Any]):
    """The inputs of one call, and copies on the host of those that were asked for there.

    A copy from a GPU waits for all that runs there, so those that a plan needs are best asked for together.
    ``results`` keeps what programs computed from the inputs.
    """

    def __init__(self, args: Sequence[Any]) -> None:
        self._args = args
        self._on_host: dict[int, Any] = {}
        self.results: dict[object, Any] = {}

    @classmethod
    def of(cls, args: Sequence[Any]) -> CallInputs:
        return args if isinstance(args, cls) else cls(args)

    def __len__(self) -> int:
        return len(self._args)

    def __getitem__(self, place: Any) -> Any:
        return self._args[place]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._args)

    def on_host(self, places: Iterable[int]) -> list[Any]:
        """Return the inputs at these places: tensors on the host, numbers as they are."""
        places = list(places)
        missing = [place for place in dict.fromkeys(places) if place not in self._on_host]
        self._on_host.update(zip(missing, _copied([self._args[place] for place in missing]), strict=True))
        return [self._on_host[place] for place in places]


def _copied(given: list[Any]) -> list[Any]:
    """All copies are under way before the first is waited for."""
    copies = [_copy(one) if isinstance(one, Tensor) else one for one in given]
    for device in {one.device for one in given if isinstance(one, Tensor) and one.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return copies


def _copy(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor.detach().cpu()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor.detach(), non_blocking=True)
