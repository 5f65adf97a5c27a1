"""Embedding and reranking through the ``compile`` method of sentence-transformers, which takes a backend's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import radix_compile
from radix_compile.plan.batching import SharedPrefixBatchSampler
from tests.models import VOCABULARY, build

OPTIONS = {"inner_backend": "aot_eager", "fold": "always", "strict": True}
WORDS = [f"w{number}" for number in range(3, VOCABULARY)]
PROMPT = " ".join(WORDS[:12]) + " "
QUERIES = [" ".join(WORDS[20 + i : 22 + 2 * i]) for i in range(6)]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a causal model of random weights and a tokenizer with one token per word."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {word: i for i, word in enumerate(WORDS, 3)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    tokenizer.save_pretrained(tmp_path)
    build("Qwen3", head="ForSequenceClassification", num_labels=1).save_pretrained(tmp_path)
    return tmp_path


def embedder(saved: Path, pooling: str) -> SentenceTransformer:
    transformer = Transformer(str(saved))
    return SentenceTransformer(
        modules=[transformer, Pooling(transformer.get_embedding_dimension(), pooling)],
        prompts={"query": PROMPT},
        device="cpu",
    )


@pytest.mark.slow  # test_batches_of_shared_prefixes makes the same calls
@pytest.mark.parametrize("pooling", ["lasttoken", "mean"])
def test_encode_with_a_prompt(saved: Path, pooling: str) -> None:
    plain, model = embedder(saved, pooling), embedder(saved, pooling)
    model.compile(backend="radix", options=OPTIONS)
    embeddings = model.encode(QUERIES, prompt_name="query", batch_size=3)
    expected = plain.encode(QUERIES, prompt_name="query", batch_size=3)
    assert abs(embeddings - expected).max() < 1e-5 * abs(expected).max()
    assert abs(expected[0] - expected[1]).max() > 0.01  # the queries have different embeddings
    stats = radix_compile.stats()
    assert stats.folded_calls == 2
    # Each of the two batches has the prompt's 12 words once, and the queries.
    assert stats.compact_tokens <= 2 * 12 + stats.tokens - 6 * 12


def test_batches_of_shared_prefixes(saved: Path) -> None:
    """``encode`` sorts by length, which separates equal prefixes. One call per sampled batch does not."""
    texts = [" ".join([*WORDS[10 * g + 10 : 10 * g + 20], *WORDS[60 : 61 + i]]) for i in range(4) for g in range(4)]
    plain, model = embedder(saved, "lasttoken"), embedder(saved, "lasttoken")
    model.compile(backend="radix", options=OPTIONS)
    with torch.inference_mode():
        expected = plain.encode(texts, batch_size=4)
        by_length = model.encode(texts, batch_size=4)
        scattered = radix_compile.stats()
        radix_compile.reset_stats()
        by_prefix = torch.empty(expected.shape)
        for batch in SharedPrefixBatchSampler(texts, 4):
            by_prefix[batch] = torch.from_numpy(model.encode([texts[i] for i in batch], batch_size=4))
    for embeddings in (by_length, by_prefix.numpy()):
        assert abs(embeddings - expected).max() < 1e-5 * abs(expected).max()
    assert scattered.compact_tokens == scattered.tokens  # sequences of equal length share nothing here
    stats = radix_compile.stats()
    assert stats.folded_calls == 4
    assert stats.compact_tokens < stats.tokens / 2


def test_reranking(saved: Path) -> None:
    """Pairs of one query with its passages share the query."""
    pairs = [(PROMPT, query) for query in QUERIES]
    plain, model = CrossEncoder(str(saved), device="cpu"), CrossEncoder(str(saved), device="cpu")
    model.compile(backend="radix", options=OPTIONS)
    scores, expected = model.predict(pairs), plain.predict(pairs)
    assert abs(scores - expected).max() < 1e-5 * abs(expected).max()
    assert abs(expected - expected[0]).max() > 1e-4
    stats = radix_compile.stats()
    assert stats.folded_calls == 1
    assert stats.compact_tokens <= stats.tokens - 5 * 12


@pytest.fixture
def generative(saved: Path) -> Path:
    """A reranker that is a language model: its score is the difference of two words' logits behind the last token."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "yes": 3, "no": 4} | {word: i for i, word in enumerate(WORDS[2:], 5)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>").save_pretrained(saved)
    build("Qwen3").save_pretrained(saved)
    return saved


def test_reranking_by_a_language_model(generative: Path) -> None:
    """sentence-transformers pads on the left for these, without position ids."""
    pairs = [(PROMPT, query) for query in QUERIES]
    plain, model = CrossEncoder(str(generative), device="cpu"), CrossEncoder(str(generative), device="cpu")
    assert model.tokenizer.padding_side == "left"
    model.compile(backend="radix", options=OPTIONS)
    scores, expected = model.predict(pairs), plain.predict(pairs)
    assert abs(scores - expected).max() < 1e-5 * abs(expected).max()
    assert (scores.argsort() == expected.argsort()).all()
    assert radix_compile.stats().compact_tokens == distinct_prefixes(pairs, model.tokenizer)


@pytest.mark.parametrize("padding", ["exact", "skip"])
def test_embedding_with_padding_on_the_left(saved: Path, padding: str) -> None:
    plain, model = embedder(saved, "lasttoken"), embedder(saved, "lasttoken")
    for one in (plain, model):
        one.tokenizer.padding_side = "left"
    model.compile(backend="radix", options=OPTIONS | {"padding": padding})
    texts = [PROMPT + query for query in QUERIES]
    embeddings, expected = model.encode(texts), plain.encode(texts)
    assert abs(embeddings - expected).max() < 1e-5 * abs(expected).max()
    lengths = [len(text.split()) for text in texts]
    returned = sum(max(lengths) - length for length in lengths)  # token embeddings are a result, those of padding too
    distinct = distinct_prefixes(texts, model.tokenizer)
    assert radix_compile.stats().compact_tokens == distinct + (returned if padding == "exact" else 0)


def distinct_prefixes(texts: list[Any], tokenizer: Any) -> int:
    rows = [tokenizer(*([text] if isinstance(text, str) else text))["input_ids"] for text in texts]
    return len({tuple(row[: i + 1]) for row in rows for i in range(len(row))})
