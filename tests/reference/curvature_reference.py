"""Curvature by its definitions: per-sample gradients of a whole model, dense quadratic forms of factors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from transformers import PreTrainedModel

from keeptune.data.calibration import Calibration
from keeptune.model.head import Labels, drawn_labels


def text_gradients(
    model: PreTrainedModel, name: str, data: Calibration, *, labels: Labels = "true", seed: int = 0
) -> Tensor:
    """Gradient of each text's summed loss in one weight, ``(texts, *weight.shape)``, one text at a time."""
    weight = f"{name}.weight"
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    rows = []
    for index, ids in enumerate(data.sequences):
        text = torch.tensor([ids])
        start = max(data.prompts[index] if data.prompts else 0, 1)

        def loss(value: Tensor, text: Tensor = text, start: int = start) -> Tensor:
            logits = functional_call(model, {**state, weight: value}, (text,), {"use_cache": False}).logits[
                0, start - 1 : -1
            ]
            wanted = text[0, start:]
            if labels == "sampled":
                (batch,) = Calibration((tuple(text[0].tolist()),), 0).batches()
                learned = torch.zeros(1, text.shape[1] - 1, dtype=torch.bool)
                learned[0, start - 1 :] = True
                wanted = drawn_labels(logits, batch, learned, seed)
            return functional.cross_entropy(logits, wanted, reduction="sum")

        rows.append(grad(loss)(state[weight].detach()))
    return torch.stack(rows)


def lora_gradients(h: Tensor, delta: Tensor, B: Tensor, A: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Gradient of each row's loss in B and in A of ``y = s B A h``, ``(rows, m, r)`` and ``(rows, r, n)``."""

    def loss(B: Tensor, A: Tensor, h: Tensor, delta: Tensor) -> Tensor:
        return scale * delta @ (B @ (A @ h))

    of_B, of_A = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, None, 0, 0))(B, A, h, delta)
    return of_B, of_A


def jacobian(B: Tensor, A: Tensor, scale: float) -> Tensor:
    """``J = d vec(s B A) / d (vec A, vec B)``, row-major, ``(mn, rn + mr)``."""
    of_A = scale * torch.kron(B, torch.eye(A.shape[1], dtype=A.dtype))
    of_B = scale * torch.kron(torch.eye(B.shape[0], dtype=B.dtype), A.T.contiguous())
    return torch.cat([of_A, of_B], dim=1)


def coupled_matrix(Omega: Tensor, Gamma: Tensor, B: Tensor, A: Tensor, scale: float) -> Tensor:
    """``Jᵀ (Γ ⊗ Ω) J``, ``(rn + mr, rn + mr)``."""
    J = jacobian(B, A, scale)
    return J.T @ torch.kron(Gamma, Omega) @ J


def block_matrix(Omega: Tensor, Gamma: Tensor, B: Tensor, A: Tensor, scale: float) -> Tensor:
    """The same without what couples A and B: ``s² BᵀΓB ⊗ Ω`` and ``s² Γ ⊗ AΩAᵀ`` on the diagonal."""
    return scale**2 * torch.block_diag(
        torch.kron(B.T @ Gamma @ B, Omega), torch.kron(Gamma, (A @ Omega @ A.T).contiguous())
    )


def exact_diagonal(
    model: PreTrainedModel, name: str, data: Calibration, part: Callable[[Tensor], Tensor] = lambda G: G
) -> Tensor:
    """``sum_t sum_y p_t[y] part(g_ty)²``, g_ty the gradient of ``-log p_t[y]`` in W, by every word y of every token."""
    weight, module = f"{name}.weight", model.get_submodule(name)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    total = torch.zeros_like(part(module.weight.detach()))
    for index, ids in enumerate(data.sequences):
        first = max(data.prompts[index] if data.prompts else 0, 1) - 1

        def surprise(value: Tensor, ids: tuple[int, ...] = ids, first: int = first) -> Tensor:
            out = functional_call(model, {**state, weight: value}, (torch.tensor([ids]),), {"use_cache": False})
            return -out.logits[0, first:-1].log_softmax(-1)

        W = module.weight.detach()
        values, gradients = surprise(W), torch.autograd.functional.jacobian(surprise, W)
        total += sum(
            p * part(g).square() for p, g in zip(values.neg().exp().flatten(), gradients.flatten(0, 1), strict=True)
        )
    return total
