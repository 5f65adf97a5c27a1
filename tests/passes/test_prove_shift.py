"""Left padding of different length keeps prefixes together exactly where no row can depend on its column."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import radix_compile
from tests.graphs import fold_of
from tests.models import VOCABULARY, assert_as_exact, build, in_float64, paths

LENGTH, WIDTH = 10, 8
STARTS = (0, 3, 1, 3)
PADDED = (torch.arange(LENGTH) >= torch.tensor(STARTS)[:, None]).long()
POSITIONS = (PADDED.cumsum(1) - 1).clamp(min=0)


def token_ids() -> Tensor:
    """The same text in every sequence, from where its padding ends."""
    text = torch.arange(3, 3 + LENGTH)
    return torch.stack([F.pad(text[: LENGTH - start], (start, 0)) for start in STARTS])


class Program(nn.Module):
    """One layer; ``before`` gets the embeddings, ``mask`` makes what attention may see."""

    def __init__(self, before: Callable[..., Tensor], mask: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.before, self.mask = before, mask

    def forward(self, ids: Tensor, padding: Tensor, positions: Tensor) -> Tensor:
        x = self.before(self, self.embedding(ids), padding, positions)
        heads = self.first(x)[:, None]
        return self.last(F.scaled_dot_product_attention(heads, heads, heads, self.mask(padding))[:, 0])


def by_positions(model: Program, x: Tensor, padding: Tensor, positions: Tensor) -> Tensor:
    return x + model.positions(positions)


def by_columns(model: Program, x: Tensor, padding: Tensor, positions: Tensor) -> Tensor:
    return x + model.positions.weight


def by_counting(model: Program, x: Tensor, padding: Tensor, positions: Tensor) -> Tensor:
    """Every row counts those before it, the padding as well."""
    return x + torch.ones_like(positions).cumsum(1)[..., None] * 0.1


def by_sums(model: Program, x: Tensor, padding: Tensor, positions: Tensor) -> Tensor:
    return x.cumsum(1)


def by_arange(model: Program, x: Tensor, padding: Tensor, positions: Tensor) -> Tensor:
    return x * torch.arange(LENGTH)[:, None].cos()


def counted(count: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Positions computed inside the program, from its mask."""

    def before(model: Program, x: Tensor, padding: Tensor, positions: Tensor) -> Tensor:
        return x + model.positions(count(padding).clamp(0, LENGTH - 1))

    return before


def causal() -> Tensor:
    return torch.arange(LENGTH) <= torch.arange(LENGTH)[:, None]


def hidden(padding: Tensor) -> Tensor:
    return causal() & (padding != 0)[:, None, None]


def windowed(padding: Tensor) -> Tensor:
    return hidden(padding) & (torch.arange(LENGTH) > torch.arange(LENGTH)[:, None] - 4)


def unhidden(padding: Tensor) -> Tensor:
    return causal().expand(len(padding), 1, -1, -1)


SHIFT = {
    "positions": (by_positions, hidden),
    "a window": (by_positions, windowed),
    "positions counted from the mask": (counted(lambda mask: mask.cumsum(1) - 1), hidden),
    "positions as generate counts them": (
        counted(lambda mask: (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 1)),
        hidden,
    ),
    "positions as OPT counts them": (counted(lambda mask: (mask.cumsum(1) * mask).long() - 1), hidden),
    "positions counted from bools": (counted(lambda mask: (mask != 0).cumsum(1) - 1), windowed),
    "positions counted from a product": (counted(lambda mask: (mask * (mask + 1)).cumsum(1).int()), hidden),
    "running sums of rows that are zero": (
        lambda model, x, padding, positions: x + (padding.cumsum(1) * padding).cumsum(1)[..., None] * 0.1,
        hidden,
    ),
}
STAY = {
    "a table by column": (by_columns, hidden),
    "counting columns": (by_counting, hidden),
    "a running sum": (by_sums, hidden),
    "an arange": (by_arange, hidden),
    "padding that is seen": (by_positions, unhidden),
    "padding that is seen and counted": (counted(lambda mask: mask.cumsum(1) - 1), unhidden),
    "counting padding": (counted(lambda mask: (mask == 0).cumsum(1)), hidden),
    "counting all": (counted(lambda mask: (mask + 1).cumsum(1) // 2), hidden),
    "counting products": (counted(lambda mask: (mask + 1).cumprod(1).log2().long()), hidden),
    "counting what a cast makes zero": (counted(lambda mask: ((mask + 0.5) * 2).int().cumsum(1) // 3), hidden),
}


def compact_rows(model: nn.Module, *args: Tensor) -> int:
    options = {"inner_backend": "aot_eager", "fold": "always"}
    radix_compile.reset_stats()
    with torch.no_grad():
        ours, plain, exact = (
            program(*args)
            for program in (torch.compile(model, backend="radix", options=options), model, in_float64(model))
        )
    # Rows of padding see no key: nothing is to be read from them, and NaN where the mask is strict.
    shown = args[1] != 0
    assert_as_exact(ours[shown], plain[shown], exact[shown].double())
    return radix_compile.stats().compact_tokens


@pytest.mark.parametrize("name", SHIFT)
def test_rows_of_the_same_text_are_one_node(name: str) -> None:
    model = Program(*SHIFT[name]).eval()
    args = token_ids(), PADDED, POSITIONS
    with torch.no_grad():
        assert fold_of(model, *args).starts.padding is not None
    assert compact_rows(model, *args) == LENGTH + sum(STARTS)


@pytest.mark.parametrize("name", STAY)
def test_not_where_a_row_may_depend_on_its_column(name: str) -> None:
    model = Program(*STAY[name]).eval()
    args = token_ids(), PADDED, POSITIONS
    with torch.no_grad():
        assert fold_of(model, *args).starts.padding is None
    assert compact_rows(model, *args) >= paths(*args)


@pytest.mark.parametrize("kind", ["Qwen3", "OPT"])
def test_the_advice_works_inside_the_compiled_function(kind: str) -> None:
    """OPT counts its positions itself."""
    changes = {"do_layer_norm_before": True, "word_embed_proj_dim": 32} if kind == "OPT" else {}
    model = build(kind, head="Model", **changes)

    def run(ids: Tensor, mask: Tensor) -> Tensor:
        given = {} if kind == "OPT" else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        hidden: Tensor = model(ids, attention_mask=mask, use_cache=False, **given).last_hidden_state
        return hidden

    ids = token_ids()
    compiled = torch.compile(run, backend="radix", options={"inner_backend": "aot_eager", "fold": "always"})
    with torch.no_grad():
        ours, plain = compiled(ids, PADDED), run(ids, PADDED)
    torch.testing.assert_close(ours[PADDED != 0], plain[PADDED != 0])
    assert radix_compile.stats().compact_tokens == LENGTH + sum(STARTS)


def test_the_report_says_what_could_be_passed() -> None:
    model = build("GPT2")
    for positions, padding, advised in (
        (None, PADDED, True),
        (POSITIONS, PADDED, False),
        (None, PADDED.flip(1), False),
    ):
        with torch.no_grad():
            explanation = radix_compile.explain(
                model, token_ids(), attention_mask=padding, position_ids=positions, use_cache=False
            )
        (graph,) = explanation.graphs
        notes = [note for note in graph.notes if "left padding" in note]
        assert bool(notes) == advised
        assert not notes or ("position_ids computed from the mask" in notes[0] and "modeling_gpt2.py" in notes[0])


def test_one_warning_where_left_padding_costs_sharing() -> None:
    model, ids = build("GPT2", head="Model"), token_ids()
    compiled = torch.compile(model, backend="radix", options={"inner_backend": "aot_eager", "fold": "always"})
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled(ids, attention_mask=PADDED, use_cache=False)
        compiled(ids[:, 1:], attention_mask=PADDED[:, 1:], use_cache=False)
    (warning,) = (str(warning.message) for warning in caught if "left padding" in str(warning.message))
    assert "pass position_ids computed from the mask" in warning
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.compile(model, backend="radix", options={"inner_backend": "aot_eager"})(
            ids, attention_mask=PADDED, position_ids=POSITIONS, use_cache=False
        )


def test_gradients() -> None:
    model = build("Qwen3").train()
    exact = in_float64(model)
    args = {"input_ids": token_ids(), "attention_mask": PADDED, "position_ids": POSITIONS, "use_cache": False}
    labels = args["input_ids"].masked_fill(PADDED == 0, -100)
    compiled = torch.compile(
        model, backend="radix", options={"inner_backend": "aot_eager", "fold": "always", "strict": True}
    )
    grads = []
    for one, program in ((model, compiled), (model, model), (exact, exact)):
        program(**args, labels=labels).loss.backward()
        grads.append([parameter.grad.clone() for parameter in one.parameters()])
        one.zero_grad()
    assert radix_compile.stats().compact_tokens == LENGTH + sum(STARTS)
    for ours, plain, reference in zip(*grads, strict=True):
        assert_as_exact(ours, plain, reference)
