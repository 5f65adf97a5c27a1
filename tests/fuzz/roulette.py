"""A random op along a random dimension of a random view. It may fold or not."""

from __future__ import annotations

from tests.fuzz.draw import Draw, Kind, piece

VIEWS = (
    (3, "x", "y"),
    (3, "x.transpose(0, 1)", "y.transpose(0, 1)"),
    (3, "x.transpose(1, 2)", "y.transpose(1, 2)"),
    (3, "x.permute(2, 0, 1)", "y.permute(1, 2, 0)"),
    (4, "x.reshape(B, S, H, E)", "y.reshape(B, S, D)"),
    (4, "x.reshape(B, S, H, E).transpose(1, 2)", "y.transpose(1, 2).reshape(B, S, D)"),
    (4, "x.reshape(B, S, H, E).permute(2, 0, 1, 3)", "y.permute(1, 2, 0, 3).reshape(B, S, D)"),
    (2, "x.reshape(B * S, D)", "y.reshape(B, S, D)"),
    (3, "x.reshape(B * S, H, E)", "y.reshape(B, S, D)"),
    (2, "x.reshape(B * S * H, E)", "y.reshape(B, S, D)"),
    (3, "x.reshape(B, S * H, E)", "y.reshape(B, S, D)"),
    (2, "x.reshape(B, S * D)", "y.reshape(B, S, D)"),
    (2, "x.transpose(1, 2).reshape(B * D, S)", "y.reshape(B, D, S).transpose(1, 2)"),
    (3, "x.reshape(S, B, D)", "y.reshape(B, S, D)"),
    (4, "x.reshape(B, H, S, E)", "y.reshape(B, S, D)"),
    (3, "x.reshape(B, D, S)", "y.reshape(B, S, D)"),
    (3, "x.reshape(D, B, S)", "y.reshape(B, S, D)"),
)
# No op that is discontinuous at equal entries: entries of equal rows are equal only up to rounding.
ALONG = (
    "y.softmax({dim})",
    "y.cumsum({dim}) / y.shape[{dim}]",
    "y.flip({dim})",
    "y.roll(1, {dim})",
    "y.sort({dim}).values",
    "y - y.mean({dim}, keepdim=True)",
    "y / (1 + y.abs().amax({dim}, keepdim=True))",
    "y * y.norm(dim={dim}, keepdim=True)",
    "y + y.logsumexp({dim}, keepdim=True)",
    "y + y.max({dim}, keepdim=True).values",
    "y * torch.arange(y.shape[{dim}]).reshape(-1, *[1] * (y.ndim - 1 - {dim}))",
    "torch.cat(y.split(1, {dim})[::-1], {dim})",
    "torch.stack(y.unbind({dim}), {dim})",
    "y.narrow({dim}, 0, 1).expand(y.shape) + y",
    "torch.sigmoid(y).cumprod({dim})",
    "y.index_select({dim}, torch.arange(y.shape[{dim}]))",
    "y * torch.sigmoid(y - y.amin({dim}, keepdim=True))",
)


@piece(Kind.ANY)
def roulette(d: Draw) -> str:
    """A random op along a random dimension of a random view."""
    rank, view, inverse = d.one_of(*VIEWS)
    op = d.one_of(*ALONG).format(dim=d.number(0, rank - 1))
    return f"y = {view}\ny = {op}\ny = {inverse if d.chance(0.9) else 'y.reshape(B, S, D)'}"
