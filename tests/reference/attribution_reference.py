"""KVA as defined: one text, one block, one point of the path at a time, by autograd on the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

POINTS = {
    "left": lambda m: [(k / m, 1 / m) for k in range(m)],
    "right": lambda m: [((k + 1) / m, 1 / m) for k in range(m)],
    "trapezoid": lambda m: [(k / (m - 1), (1 if 0 < k < m - 1 else 0.5) / (m - 1)) for k in range(m)],
    # Legendre's polynomial of degree 3 has its roots at 0 and ±√(3/5).
    "gauss-legendre": lambda m: {3: [(0.5 - 0.15**0.5, 5 / 18), (0.5, 4 / 9), (0.5 + 0.15**0.5, 5 / 18)]}[m],
}


def downs_of(model: Any) -> Sequence[nn.Module]:
    ends = ("mlp.c_proj", "mlp.down_proj", "fc2", "mlp.dense_4h_to_h")
    return [module for name, module in model.named_modules() if name.endswith(ends)]


def outputs(model: Any, ids: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """z of each block, ``(S, D)``, and the last position's logits."""
    found: list[Tensor] = []
    handles = [
        m.register_forward_hook(lambda m, i, out: found.append(out.detach().flatten(0, -2))) for m in downs_of(model)
    ]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1]
    for handle in handles:
        handle.remove()
    return found, logits


def scored(model: Any, ids: Sequence[int], layer: int, value: Tensor, token: int, target: str) -> Tensor:
    """F with the down-projection's output at all positions replaced, ``(S, D)``."""
    handle = downs_of(model)[layer].register_forward_hook(lambda m, i, out: value.to(out.dtype).reshape(out.shape))
    logits = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1]
    handle.remove()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits[token] if target == "logit" else logits.softmax(dim=-1)[token]


def attribution(
    model: Any,
    ids: Sequence[int],
    token: int | None = None,
    *,
    positions: str = "last",
    baseline: str = "zero",
    pad_token: int = 0,
    target: str = "probability",
    rule: str = "left",
    steps: int = 7,
    times_activation: bool = True,
) -> Tensor:
    """``(L, D)``, of the last token's nodes."""
    z, logits = outputs(model, ids)
    z = [value.float() for value in z]
    token = int(logits.argmax()) if token is None else token
    start = [torch.zeros_like(value) for value in z]
    if baseline == "pad":
        start = [value.float() for value in outputs(model, [pad_token] * len(ids))[0]]
    found = []
    for layer in range(len(z)):
        total = torch.zeros(z[layer].shape[1])
        for alpha, weight in POINTS[rule](steps):
            path = start[layer] + alpha * (z[layer] - start[layer])
            if positions == "last":
                path = torch.cat([z[layer][:-1], path[-1:]])
            path = path.clone().requires_grad_(True)
            scored(model, ids, layer, path, token, target).backward()
            assert path.grad is not None
            total = total + weight * path.grad[-1]
        found.append(total * (z[layer] - start[layer])[-1] if times_activation else total)
    return torch.stack(found)
