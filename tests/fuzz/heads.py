"""The last computation of a program: logits, losses, or one row or mean for each sequence."""

from __future__ import annotations

from tests.fuzz.draw import Draw

LOGITS = "logits = F.linear(x, w(V, D))\n"

EXACT = "((logits * 8).round().float() / 8)"
"""Logits that float32 holds exactly, so that losses computed from them in float64 can be compared in float64."""


def draw_head(d: Draw) -> str:
    return d.one_of(_loss, _loss, _pooled, _masked_loss)(d)


def _loss(d: Draw) -> str:
    """Logits, log-probabilities or a loss over the vocabulary."""
    reduction = d.one_of("'sum'", "'none'", "'mean'")
    dtype = d.one_of("", "", ", dtype=torch.float64", ", dtype=torch.float32")
    shifted = "logits[:, :-1].reshape(-1, V), ids[:, 1:].reshape(-1)"
    later = "ids[:, 1:, None]"
    return LOGITS + d.one_of(
        "y = logits",
        f"y = F.cross_entropy({shifted})",
        f"y = F.cross_entropy({shifted}, reduction={reduction}, ignore_index=0)",
        "y = F.cross_entropy(logits.reshape(-1, V), ids.roll(-1, 1).reshape(-1), label_smoothing=0.1)",
        "y = F.cross_entropy(logits.flatten(0, 1), ids.reshape(-1).roll(-1))",
        "y = F.cross_entropy(logits.mT, F.pad(ids, (0, 1), value=-100)[:, 1:], reduction='none')",
        f"y = F.cross_entropy({shifted}, weight=w(V).detach().sigmoid())",
        f"y = logits.log_softmax(-1{dtype}).gather(-1, ids.roll(-1, 1)[..., None]).squeeze(-1)",
        f"y = logits[:, :-1].log_softmax(-1{dtype}).gather(-1, {later})",
        f"y = {EXACT}.log_softmax(-1, dtype=torch.float64).gather(-1, ids.roll(-1, 1)[..., None]).squeeze(-1)",
        f"y = F.nll_loss({EXACT}.log_softmax(-1, dtype=torch.float64).flatten(0, 1), ids.flatten())",
        f"y = F.log_softmax(logits[:, :-1], -1{dtype}).gather(-1, {later}).squeeze(-1).sum(-1)",
        f"y = F.nll_loss(logits.log_softmax(-1{dtype}).flatten(0, 1), ids.flatten())",
        f"y = F.nll_loss(F.log_softmax(logits.view(-1, V), 1{dtype}), ids.roll(-1, 1).view(-1), reduction={reduction})",
        f"y = logits[:, :-1].softmax(-1{dtype}).gather(-1, {later}).log()",
        f"y = logits[:, :-1].gather(-1, {later}) - logits[:, :-1].logsumexp(-1, keepdim=True)",
        f"with torch.no_grad():\n    p = logits[:, :-1].log_softmax(-1{dtype})\ny = p.gather(-1, {later}) * x[:, 1:]",
        f"p = logits.log_softmax(-1{dtype})\ny = p[:, :-1].gather(-1, {later}) - (p.exp() * p).sum(-1)[:, :-1, None]",
        "y = F.cross_entropy(logits.flatten(0, 1).float(), ids.roll(-1, 1).flatten())"
        if d.chance(0.2)
        else "y = F.cross_entropy(logits.flatten(0, 1), logits.detach().softmax(-1).flatten(0, 1))",
    )


def _lengths(d: Draw) -> str:
    """``[B]``: the number of tokens of each sequence."""
    lengths = ["(ids != 0).sum(1)"]
    lengths += ["padding.long().sum(-1)"] * 2 * d.has("padding") + ["lengths"] * 2 * d.has("lengths")
    return d.one_of(*lengths)


def _shown(d: Draw) -> str:
    """``[B, S]``: a mask of the tokens that count."""
    length = _lengths(d)
    return d.one_of("(ids != 0)", f"(torch.arange(S) < {length}[:, None])", *["(padding != 0)"] * 2 * d.has("padding"))


def _pooled(d: Draw) -> str:
    """One row, sum or mean for each sequence."""
    length, shown = _lengths(d), _shown(d)
    last = f"({length} - 1).clamp(min=0)"
    return "y = " + d.one_of(
        f"x[torch.arange(B), {length} - 1]",
        f"x.gather(1, {last}[:, None, None].expand(B, 1, D)).squeeze(1)",
        f"x[torch.arange(B), {last}] @ w(D, D)",
        f"(x * {shown}[..., None]).sum(1)",
        f"(x * {shown}[..., None]).sum(1) / {shown}.sum(1, keepdim=True).clamp(min=1)",
        f"x.masked_fill(~{shown}[..., None], -math.inf).amax(1)",
        f"x.masked_fill(~{shown}[..., None], 0.0)",
        f"torch.einsum('bsd,bs->bd', x, {shown}.double())",
        "x[:, 0] @ w(D, D)",
        "x[:, 0].tanh()",
        "x[:, -1]",
        "F.normalize(x[:, -1], dim=-1)",
        "x.mean(1)",
        f"x[torch.arange(B), torch.arange(S).mul({shown}).argmax(-1)]",
        f"F.linear(x, w(2, D))[torch.arange(B), {last}].log_softmax(-1)",
    )


def _masked_loss(d: Draw) -> str:
    """A loss over the tokens that count."""
    shown = _shown(d)
    losses = "losses = F.cross_entropy(logits.mT, ids.roll(-1, 1), reduction='none')\n"
    return LOGITS + d.one_of(
        f"y = F.cross_entropy(logits.flatten(0, 1), ids.masked_fill(~{shown}, -100).flatten())",
        f"y = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids.masked_fill(~{shown}, -100)[:, 1:].flatten())",
        f"{losses}y = (losses * {shown}).sum() / {shown}.sum()",
        f"{losses}y = (losses * {shown}).sum(-1)",
        f"y = (logits.log_softmax(-1).gather(-1, ids.roll(-1, 1)[..., None]).squeeze(-1) * {shown}).sum(1)",
        f"y = logits.masked_fill(~{shown}[..., None], {d.one_of('0.0', '-1e9', '-math.inf')})",
        f"y = torch.where({shown}[..., None], logits, -100.0).log_softmax(-1)",
        "ahead = torch.cat([ids[:, 1:], torch.full((B, 1), -100)], 1)\n"
        "y = F.cross_entropy(logits.view(-1, V), ahead.view(-1))",
    )
