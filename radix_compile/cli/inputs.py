"""The model and the batch that a command is about."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from radix_compile.passes.pipeline import BUGS

FIELDS = ("prompt", "text", "question", "query", "input", "content")
"""Where a line of a data file has its text, if no field is named."""
MODEL_HELP = "a name on the Hugging Face hub, a local path, config:PATH (random weights), or python:MODULE:CALLABLE"


class UsageError(Exception):
    """The question cannot be answered as it was asked; the message is one line for the user."""


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")


def add_batch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="FILE.jsonl", help="the first lines of a file, instead of a made batch")
    parser.add_argument("--field", help=f"of the file's lines (default: the first of {', '.join(FIELDS)})")
    parser.add_argument("--tokenizer", help="for --data (default: the model's own)")
    parser.add_argument("--batch", type=positive, default=8, help="sequences (default: %(default)s)")
    parser.add_argument("--prefix", type=natural, default=64, help="tokens that all share (default: %(default)s)")
    parser.add_argument("--suffix", type=positive, default=16, help="tokens of each alone (default: %(default)s)")


def positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def natural(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return int(text)


# ----------------------------------------------------------------------------------------------------------- models


def load_model(options: argparse.Namespace) -> nn.Module:
    """In evaluation mode, on the device, in the dtype."""
    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {options.device} is not there: {str(error).splitlines()[0]}") from error
    kind, _, rest = options.model.partition(":")
    if kind == "python":
        model = _from_python(rest)
    else:
        model = _from_transformers(rest if kind == "config" else options.model, random=kind == "config")
    return model.to(device, getattr(torch, options.dtype)).eval()


def _from_python(place: str) -> nn.Module:
    name, _, attribute = place.partition(":")
    if not (name and attribute):
        raise UsageError("expected python:MODULE:CALLABLE, as in python:my_package.models:small")
    sys.path.insert(0, "")
    try:
        make = getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"python:{place}: {error}") from error
    try:
        model = make if isinstance(make, nn.Module) else make()
    except TypeError as error:
        raise UsageError(f"python:{place}: called without arguments, {error}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"python:{place} made {type(model).__name__}; expected a torch.nn.Module")
    return model


def _from_transformers(place: str, random: bool) -> nn.Module:
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(place)
        architecture = (getattr(config, "architectures", None) or [""])[0]
        owner = getattr(transformers, architecture, None) or transformers.AutoModelForCausalLM
        if random:
            torch.manual_seed(0)
            made: nn.Module = owner(config) if owner.__name__ == architecture else owner.from_config(config)
            return made
        loaded: nn.Module = owner.from_pretrained(place)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(_why_not_loaded(place, error)) from error
    return loaded


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise UsageError("models need transformers: pip install 'radix-compile[hf]'") from error


_OFFLINE = ("couldn't connect", "ConnectError", "ConnectionError", "Name or service", "Network", "offline", "resolve")


def _why_not_loaded(place: str, error: Exception) -> str:
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)  # type: ignore[arg-type]
    said = " ".join(f"{type(one).__name__} {one}" for one in causes)
    if not Path(place).exists() and any(word in said for word in _OFFLINE):
        return f"{place}: no such path, and no network to ask the hub: pass a local path, or config:PATH"
    if "Repo id must" in said:
        return f"{place}: no such path, and not a name on the hub"
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"{place}: {first}"


# ----------------------------------------------------------------------------------------------------------- batches


def load_batch(options: argparse.Namespace, model: nn.Module) -> dict[str, Tensor]:
    """``input_ids`` ``[B, S]`` int64, and ``attention_mask`` if the sequences are of different lengths."""
    if options.data is None:
        return {"input_ids": made_batch(model, options.batch, options.prefix, options.suffix).to(options.device)}
    texts = list(read(options.data, options.field))[: options.batch]
    if options.tokenizer is None and options.model.startswith("python:"):
        raise UsageError("a python: model has no tokenizer: pass --tokenizer with --data")
    by = load_tokenizer(options.tokenizer or options.model.removeprefix("config:"))
    rows = [by(text) for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    batch = {"input_ids": ids.to(options.device)}
    if any(len(row) < longest for row in rows):
        lengths = torch.tensor([len(row) for row in rows])
        batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long().to(options.device)
    return batch


def made_batch(model: nn.Module, batch: int, prefix: int, suffix: int) -> Tensor:
    """Ids that the model has, the first ``prefix`` columns the same in all sequences. ``[batch, prefix + suffix]``"""
    tables = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    vocabulary = max(tables, default=1000)
    ids = torch.randint(1, vocabulary, (batch, prefix + suffix), generator=torch.Generator().manual_seed(0))
    ids[:, :prefix] = ids[0, :prefix].clone()
    return ids


def arguments_of(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How to call the model: a model of transformers by name and without a cache, any other with the ids alone.

    It is called once as it is: what it raises by itself is the user's to know in one line.
    """
    parameters = inspect.signature(model.forward).parameters
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if "input_ids" in parameters:
        kwargs = {**batch, **({"use_cache": False} if "use_cache" in parameters else {})}
    else:
        args = (batch["input_ids"],)
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except BUGS as error:
        first = (str(error).splitlines() or [""])[0]
        given = f"ids of the shape {list(batch['input_ids'].shape)} below {int(batch['input_ids'].max()) + 1}"
        raise UsageError(f"the model itself fails on {given}: {type(error).__name__}: {first}") from error
    return args, kwargs


def read(path: str, field: str | None = None) -> Iterator[str]:
    """The texts of a ``.jsonl`` file, in order. A line is a string, or an object with the text in a field."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}") from error
    found = 0
    for number, line in enumerate(lines, start=1):
        if line.strip():
            found += 1
            yield _text_of(line, field, f"{path}, line {number}")
    if not found:
        raise UsageError(f"{path} is empty")


def _text_of(line: str, field: str | None, where: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where}: not JSON: {error}") from error
    if isinstance(value, Mapping):
        name = field or next((one for one in FIELDS if one in value), None)
        if name is None or name not in value:
            raise UsageError(f"{where}: no field {field or 'of text'}; there are {', '.join(value)}: say --field")
        value = value[name]
    if not isinstance(value, str):
        raise UsageError(f"{where}: expected text, not {type(value).__name__}")
    return value


def load_tokenizer(name: str) -> Callable[[str], list[int]]:
    """From text to ids."""
    transformers = _transformers()
    try:
        by = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"--tokenizer {_why_not_loaded(name, error)}") from error

    def ids_of(text: str) -> list[int]:
        ids: list[int] = by(text)["input_ids"]
        if not ids and text:
            raise UsageError(f"--tokenizer {name} makes no tokens of {text[:40]!r}: there is no vocabulary with it")
        return ids

    return ids_of
