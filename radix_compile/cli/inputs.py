"""The arguments for the model and the batch, which several commands share, and how both are loaded."""

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
"""The fields in which the text of a line is looked up without ``--field``."""
MODEL_HELP = (
    "a name on the Hugging Face hub, a local path, config:PATH (a configuration, with random weights), or"
    " python:MODULE:CALLABLE (a function that returns a torch.nn.Module, or a module)"
)


class UsageError(Exception):
    """Wrong arguments or input. The message is one line for the user."""


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")


def add_batch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", metavar="FILE.jsonl", help="use the first lines of this file instead of random tokens"
    )
    parser.add_argument("--field", help=f"field with the text in --data (default: the first of {', '.join(FIELDS)})")
    parser.add_argument("--tokenizer", help="tokenizer for --data, a name or a path (default: the model's)")
    parser.add_argument("--batch", type=positive, default=8, help="number of sequences (default: %(default)s)")
    parser.add_argument(
        "--prefix",
        type=natural,
        default=64,
        help="number of random tokens that all share (default: %(default)s)",
    )
    parser.add_argument(
        "--suffix", type=positive, default=16, help="number of further random tokens of each (default: %(default)s)"
    )


def positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def natural(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number >= 0")
    return int(text)


# ----------------------------------------------------------------------------------------------------------- models


def load_model(options: argparse.Namespace) -> nn.Module:
    """Return the model in evaluation mode, on ``--device`` and in ``--dtype``."""
    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {options.device} is not available: {str(error).splitlines()[0]}") from error
    kind, _, rest = options.model.partition(":")
    if kind == "python":
        model = _load_from_python(rest)
    else:
        model = _load_from_transformers(rest if kind == "config" else options.model, random=kind == "config")
    return model.to(device, getattr(torch, options.dtype)).eval()


def _load_from_python(spec: str) -> nn.Module:
    name, _, attribute = spec.partition(":")
    if not (name and attribute):
        raise UsageError("expected python:MODULE:CALLABLE, as in python:my_package.models:small")
    sys.path.insert(0, "")
    try:
        target = getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"python:{spec}: {error}") from error
    try:
        model = target if isinstance(target, nn.Module) else target()
    except TypeError as error:
        raise UsageError(f"python:{spec}: the call without arguments failed: {error}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"python:{spec} returned {type(model).__name__}; expected a torch.nn.Module")
    return model


def _load_from_transformers(name_or_path: str, random: bool) -> nn.Module:
    transformers = _import_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(name_or_path)
        architecture = (getattr(config, "architectures", None) or [""])[0]
        model_class = getattr(transformers, architecture, None) or transformers.AutoModelForCausalLM
        model: nn.Module
        if not random:
            model = model_class.from_pretrained(name_or_path)
            return model
        torch.manual_seed(0)
        model = model_class(config) if model_class.__name__ == architecture else model_class.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(_explain_load_error(name_or_path, error)) from error
    return model


def _import_transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise UsageError("this needs transformers: pip install 'radix-compile[hf]'") from error


_NETWORK_ERRORS = (
    "couldn't connect",
    "ConnectError",
    "ConnectionError",
    "Name or service",
    "Network",
    "offline",
    "resolve",
)


def _explain_load_error(name_or_path: str, error: Exception) -> str:
    """Return one line about why ``from_pretrained`` failed."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)  # type: ignore[arg-type]
    messages = " ".join(f"{type(cause).__name__} {cause}" for cause in causes)
    if not Path(name_or_path).exists() and any(phrase in messages for phrase in _NETWORK_ERRORS):
        return f"{name_or_path}: no such path, and the hub cannot be reached: pass a local path, or config:PATH"
    if "Repo id must" in messages:
        return f"{name_or_path}: no such path, and not a name on the hub"
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"{name_or_path}: {first_line}"


# ----------------------------------------------------------------------------------------------------------- batches


def load_batch(options: argparse.Namespace, model: nn.Module) -> dict[str, Tensor]:
    """Return ``input_ids`` ``[B, S]`` int64, and ``attention_mask`` if the sequences have different lengths."""
    if options.data is None:
        return {"input_ids": random_batch(model, options.batch, options.prefix, options.suffix).to(options.device)}
    texts = list(read_texts(options.data, options.field))[: options.batch]
    if options.tokenizer is None and options.model.startswith("python:"):
        raise UsageError("a python: model has no tokenizer: pass --tokenizer with --data")
    tokenize = load_tokenizer(options.tokenizer or options.model.removeprefix("config:"))
    sequences = [tokenize(text) for text in texts]
    longest = max(map(len, sequences))
    ids = torch.tensor([sequence + [0] * (longest - len(sequence)) for sequence in sequences])
    batch = {"input_ids": ids.to(options.device)}
    if any(len(sequence) < longest for sequence in sequences):
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long().to(options.device)
    return batch


def random_batch(model: nn.Module, batch: int, prefix: int, suffix: int) -> Tensor:
    """Return random ids ``[batch, prefix + suffix]`` from the model's vocabulary, with ``prefix`` equal columns."""
    tables = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    vocabulary = max(tables, default=1000)
    ids = torch.randint(1, vocabulary, (batch, prefix + suffix), generator=torch.Generator().manual_seed(0))
    ids[:, :prefix] = ids[0, :prefix].clone()
    return ids


def arguments_of(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of the call: keywords for a model that takes ``input_ids``, else the ids alone.

    The uncompiled model is called once, so that its own errors are told apart from those of compilation.
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
        first_line = (str(error).splitlines() or [""])[0]
        ids = f"ids of the shape {list(batch['input_ids'].shape)} below {int(batch['input_ids'].max()) + 1}"
        raise UsageError(f"the model itself fails on {ids}: {type(error).__name__}: {first_line}") from error
    return args, kwargs


def read_texts(path: str, field: str | None = None) -> Iterator[str]:
    """Yield the texts of a ``.jsonl`` file. Each line is a string, or an object with the text in a field."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}") from error
    is_empty = True
    for number, line in enumerate(lines, start=1):
        if line.strip():
            is_empty = False
            yield _text_of(line, field, f"{path}, line {number}")
    if is_empty:
        raise UsageError(f"{path} is empty")


def _text_of(line: str, field: str | None, where: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where}: not JSON: {error}") from error
    if isinstance(value, Mapping):
        name = field or next((name for name in FIELDS if name in value), None)
        if name is None or name not in value:
            missing = f"no field {field}" if field else "no text field found"
            raise UsageError(f"{where}: {missing}; the fields are {', '.join(value)}: choose one with --field")
        value = value[name]
    if not isinstance(value, str):
        raise UsageError(f"{where}: expected text, not {type(value).__name__}")
    return value


def load_tokenizer(name: str) -> Callable[[str], list[int]]:
    """Return a function from text to token ids."""
    transformers = _import_transformers()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"--tokenizer {_explain_load_error(name, error)}") from error

    def tokenize(text: str) -> list[int]:
        ids: list[int] = tokenizer(text)["input_ids"]
        if not ids and text:
            raise UsageError(f"--tokenizer {name} returns no tokens for {text[:40]!r}: its vocabulary is missing")
        return ids

    return tokenize
