"""Kronecker factors against those of an outside library, curvlinops, on the same tiny model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import MODELS, Bench, asking, calibration, relative
from torch import Tensor, nn

from keeptune.data.calibration import Calibration
from keeptune.statistics.covariance import GradientCovariance, InputCovariance, TokenCount, tokens_per_learned
from keeptune.statistics.request import Labels

TEXTS = calibration(lengths=(9,) * 12).sequences


class Logits(nn.Module):
    """What curvlinops wants of a model: ``(texts, classes, positions)``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits[:, :-1].transpose(1, 2)


def theirs(model: Any, names: list[str], prompt: int, kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Input and gradient factors by module: sums over loss terms, in texts of one length, in three batches."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it uses what PyTorch has deprecated
        from curvlinops import KFACLinearOperator
    wrapped = Logits(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    parameters = [model.get_parameter(f"{name}.weight").requires_grad_(True) for name in names]
    ids = torch.tensor(TEXTS)
    wanted = ids[:, 1:].clone()
    wanted[:, : max(prompt - 1, 0)] = -100
    data = list(zip(ids.split(5), wanted.split(5), strict=True))
    loss = nn.CrossEntropyLoss(reduction="sum")
    operator = KFACLinearOperator(wrapped, loss, parameters, data, check_deterministic=False, fisher_type=kind)
    operator.compute_kronecker_factors()
    found = operator.state_dict()
    plain = len("model.")
    inputs, gradients = (found[f"{kind}_covariances"] for kind in ("input", "gradient"))
    return {k[plain:]: v for k, v in inputs.items()}, {k[plain:]: v for k, v in gradients.items()}


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("prompt", [0, 4])
def test_empirical_factors_are_those_of_curvlinops(architecture: str, prompt: int, tmp_path: Path) -> None:
    """Their product is the sum over tokens; over the learned ones it is ours, N/T and all."""
    prompts = (prompt,) * len(TEXTS) if prompt else None
    bench = Bench(
        MODELS[architecture](),
        tmp_path,
        data=Calibration(TEXTS, 0) if prompts is None else Calibration.of_answers(TEXTS, 0, prompts),
    )
    Omega, Gamma = InputCovariance("knowledge"), GradientCovariance("knowledge", "true")
    count = TokenCount("knowledge")
    statistics = bench.collect(asking(Omega, Gamma, count), batch_tokens=30)
    targets = bench.targets()
    inputs, gradients = theirs(bench.model, [target.name for target in targets], prompt, "empirical")
    for target in targets:
        view = statistics.view(target)
        ratio = tokens_per_learned(view, count)
        assert relative(view[Omega], inputs[target.name]) < 1e-5
        assert relative(ratio * view[Gamma], gradients[target.name] / bench.data.learned_tokens) < 1e-5


@pytest.mark.parametrize("labels", ["sampled", "probe"])
def test_drawn_factors_are_on_average_the_exact_ones_of_curvlinops(labels: Labels, tmp_path: Path) -> None:
    """Theirs go back once per class ("type-2"): the expectation over labels, without draws.

    Behind the last attention only: elsewhere theirs lets the labels of a text's tokens cancel or add up.
    """
    bench = Bench(MODELS["llama"](), tmp_path, Calibration(TEXTS, 0), roles=["gate_proj", "up_proj", "down_proj"])
    request = GradientCovariance("knowledge", labels, probes=100)
    count = TokenCount("knowledge")
    statistics = bench.collect(asking(count, request))
    targets = [target for target in bench.targets() if target.layer == 1]
    _, gradients = theirs(bench.model, [target.name for target in targets], 0, "type-2")
    for target in targets:
        view = statistics.view(target)
        mean = view[request] * tokens_per_learned(view, count)
        wanted = gradients[target.name] / bench.data.learned_tokens
        assert relative(mean, wanted) < 0.1
        assert float(mean.trace() / wanted.trace()) == pytest.approx(1, abs=0.03)
