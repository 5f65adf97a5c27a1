"""The results of a program: equal ones, views of each other, and results in other layouts."""

from __future__ import annotations

from tests.fuzz.draw import Draw

HEADS = "y.reshape(B, S, H, E)"


def layout(d: Draw) -> str:
    """``y`` in another layout."""
    width = d.number(1, d.sizes.D - 1)
    return d.one_of(
        *["y.transpose(0, 1)", "y.mT", "y.mT.contiguous()", "y.permute(2, 0, 1)", "y.permute(1, 2, 0).contiguous()"],
        *[f"{HEADS}.transpose(1, 2)", f"{HEADS}.permute(2, 0, 1, 3)", f"{HEADS}.transpose(1, 2).contiguous()"],
        *["y.reshape(B * S, D)", "y.flatten()", "y.unflatten(-1, (H, E))", "y.view(B, S, H, E)", "y[None]"],
        *["F.linear(y, w(3 * D, D)).chunk(3, -1)[1]", f"y.split([{width}, D - {width}], -1)[1]", f"y[..., :{width}]"],
        *[
            "y[:, 1:]",
            "y[:, :-1]",
            "y[:, -1]",
            "y[:, 0]",
            "y[:, ::2]",
            "y[1:]",
            "y[0]",
            "y[..., 0]",
            "y[:, -1:].squeeze(1)",
        ],
        *["y[..., :1].expand(B, S, D)", "y[..., None].expand(B, S, D, 2)", "y.mean(-1, keepdim=True).expand(B, S, D)"],
        "y.mT.contiguous().as_strided((B, D, S), (D * S, S, 1))",
        f"{HEADS}.transpose(1, 2).contiguous().as_strided((B, H, S, E), (H * S * E, S * E, E, 1))",
        f"{HEADS}.transpose(1, 2).contiguous().as_strided((B, H, S - 1, 2, E), (H * S * E, S * E, E, E, 1))",
        *["y.transpose(0, 1).clone()", "torch.empty_like(y.mT).copy_(y.mT)", "y.mT * 2", "y.transpose(0, 1).tanh()"],
        *["y + y.transpose(0, 1).contiguous().transpose(0, 1)", "y.transpose(0, 1) @ w(D, D)", "y.mT.softmax(1)"],
        *[
            f"{HEADS}.transpose(1, 2).softmax(-1)",
            f"F.linear({HEADS}.transpose(1, 2), w(E, E))",
            "y.permute(2, 1, 0).contiguous().permute(2, 1, 0)",
        ],
        *["torch.cat([y, y], -1)", "torch.stack([y, y], 1)", "torch.stack([y, y], -1)", "y.unbind(1)[0]", "y.detach()"],
        *[
            "F.layer_norm(y.transpose(0, 1), (D,))",
            "y.sum(-1)",
            "y.transpose(0, 1).sum(-1)",
            "y.float()",
            "y.argmax(-1)",
        ],
        *["y.to(memory_format=torch.contiguous_format)", "y.mT.reshape(B, H, E, S)", "torch.ones(S, D) * y[:1]"],
    )


def _pairs(d: Draw) -> list[str]:
    """Two or three results that are equal, share memory, or differ in layout or dtype."""
    other = layout(d)
    return d.one_of(
        ["y * 2", "y * 2"],
        [other, other],
        ["y", "y"],
        ["y", other],
        [other, "y"],
        ["y", layout(d), layout(d)],
        ["y", "y.clone()"],
        ["y.clone()", "y.clone()"],
        ["y + 0", "y * 1"],
        ["y", "y.contiguous()"],
        ["y", "y.to(y.dtype)"],
        ["y", "y.detach()"],
        ["y", "y.expand(B, S, D)"],
        ["y.unbind(1)[0]", "y.unbind(1)[1]"],
        [*("y.chunk(2, -1)[0]", "y.chunk(2, -1)[1]")],
        [*(f"{part}.contiguous()" for part in ("y", "y.mT", "y.mT"))],
        ["ids + 1", "ids + 1", "y"],
        ["torch.zeros(S)", "torch.zeros(S)", "y"],
        ["torch.arange(S)", "torch.arange(S)", "y"],
        ["y.tanh()", "y.tanh().view(B, S, H, E)"],
        ["F.linear(y, t)", "F.linear(y, t)"],
        ["F.linear(y, t).chunk(2, -1)[0]", "F.linear(y, t)"],
        ["y.float()", "y.double()"],
        ["ids", "y"],
    )


def draw_outputs(d: Draw) -> str:
    """Lines that compute ``results`` from ``y``."""
    results = [layout(d)] if d.chance(0.4) else _pairs(d)
    first = "t = w(D, D)\n" if any("y, t)" in result for result in results) else ""
    return f"{first}results = {', '.join(results)},"
