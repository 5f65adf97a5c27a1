"""The forms of call on the compatibility page."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.compatibility.families import FAMILIES, VOCABULARY

Call = Callable[..., Any]
LENGTHS = (24, 22, 18, 24, 20, 17)
BATCH, LONGEST, SHARED = len(LENGTHS), max(LENGTHS), 14
AT_RIGHT = (torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None]).long()
AT_LEFT = AT_RIGHT.flip(1)


def token_ids() -> Tensor:
    """``[BATCH, LONGEST]``: a shared prefix, then other tokens in every sequence."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (BATCH, LONGEST), generator=generator)
    ids[:, :SHARED] = ids[0, :SHARED]
    return ids


def at_left(ids: Tensor) -> Tensor:
    """The sequences, cut to their lengths, with the padding on the left."""
    result = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        result[row, LONGEST - length :] = ids[row, :length]
    return result


def _ids_only(model: nn.Module, call: Call) -> Any:
    return call(input_ids=token_ids())


def _ones(model: nn.Module, call: Call) -> Any:
    return call(input_ids=token_ids(), attention_mask=torch.ones(BATCH, LONGEST, dtype=torch.long))


def _right(model: nn.Module, call: Call, **options: Any) -> Any:
    return call(input_ids=token_ids() * AT_RIGHT, attention_mask=AT_RIGHT, **options)


def _left(model: nn.Module, call: Call, **options: Any) -> Any:
    return call(input_ids=at_left(token_ids()), attention_mask=AT_LEFT, **options)


def _left_with_positions(model: nn.Module, call: Call) -> Any:
    """Call the model as ``generate`` does."""
    return _left(model, call, position_ids=(AT_LEFT.cumsum(1) - 1).clamp(min=0))


def _offset_positions(model: nn.Module, call: Call) -> Any:
    return call(input_ids=token_ids(), position_ids=5 + torch.arange(LONGEST).repeat(BATCH, 1), use_cache=False)


def _restarting_positions(model: nn.Module, call: Call) -> Any:
    """Pass two documents in each sequence."""
    positions = torch.cat([torch.arange(LONGEST // 2), torch.arange(LONGEST // 2)]).repeat(BATCH, 1)
    return call(input_ids=token_ids(), position_ids=positions, use_cache=False)


def _packed(model: nn.Module, call: Call) -> Any:
    """Pass all sequences packed in one row."""
    positions = torch.arange(LONGEST).repeat(BATCH)[None]
    return call(input_ids=token_ids().view(1, -1), position_ids=positions, use_cache=False)


def _own_mask(model: nn.Module, call: Call) -> Any:
    lowest = torch.finfo(torch.float32).min
    mask = torch.full((BATCH, 1, LONGEST, LONGEST), lowest).triu(1)
    return call(input_ids=token_ids(), attention_mask=mask)


def _embeddings(model: nn.Module, call: Call) -> Any:
    ids = token_ids().to(next(model.parameters()).device)
    return call(inputs_embeds=model.get_input_embeddings()(ids))  # type: ignore[operator]


def _no_cache(model: nn.Module, call: Call) -> Any:
    return _right(model, call, use_cache=False)


def _static_cache(model: nn.Module, call: Call) -> Any:
    cache = transformers.StaticCache(config=model.config, max_cache_len=2 * LONGEST)
    return call(input_ids=token_ids(), past_key_values=cache, use_cache=True)


def _chunks(model: nn.Module, call: Call) -> Any:
    """Pass a prompt in two calls with one cache."""
    ids, half = token_ids(), LONGEST // 2
    cache = transformers.DynamicCache(config=model.config)
    call(input_ids=ids[:, :half], past_key_values=cache, use_cache=True)
    return call(input_ids=ids[:, half:], past_key_values=cache, use_cache=True)


def _labels(model: nn.Module, call: Call) -> Any:
    ids = token_ids() * AT_RIGHT
    return call(input_ids=ids, attention_mask=AT_RIGHT, labels=ids.masked_fill(AT_RIGHT == 0, -100))


def _autocast(model: nn.Module, call: Call) -> Any:
    with torch.autocast(next(model.parameters()).device.type, torch.bfloat16):
        return _right(model, call)


def _inference_mode(model: nn.Module, call: Call) -> Any:
    with torch.inference_mode():
        return _right(model, call)


def _images(model: nn.Module, call: Call) -> Any:
    return call(pixel_values=torch.randn(BATCH, 3, 16, 16, generator=torch.Generator().manual_seed(1)))


FORMS: dict[str, Callable[[nn.Module, Call], Any]] = {
    "right padding": _right,
    "ids only": _ids_only,
    "mask of ones": _ones,
    "left padding": _left,
    "left padding, positions": _left_with_positions,
    "positions from 5": _offset_positions,
    "positions restart": _restarting_positions,
    "packed in one row": _packed,
    "own 4-D mask": _own_mask,
    "embeddings": _embeddings,
    "no cache": _no_cache,
    "static cache": _static_cache,
    "two chunks": _chunks,
    "labels": _labels,
    "autocast": _autocast,
    "inference mode": _inference_mode,
    "images": _images,
}


def without_gradients(form: str) -> contextlib.AbstractContextManager[Any]:
    """Disable gradients, except with labels, which are for training."""
    return contextlib.nullcontext() if form == "labels" else torch.no_grad()


def forms_of(family: str) -> list[str]:
    """The forms of call that fit the family. Labels fit language models only."""
    if FAMILIES[family].images:
        return ["images"]
    unfit = {"images", "labels"} if "num_labels" in FAMILIES[family].changes else {"images"}
    return [form for form in FORMS if form not in unfit]
