"""Diagonals and Kronecker factors of the Fisher against per-sample gradients."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import (
    MODELS,
    Bench,
    RepaddingRunner,
    asking,
    calibration,
    mask_forgotten,
    padded_left,
    relative,
    task,
)
from tests.reference.curvature_reference import exact_diagonal, lora_gradients, text_gradients
from tests.reference.gradient_reference import rows_of
from torch import Tensor
from torch.nn import functional

from keeptune.atlas import data_path, model_path
from keeptune.core.artefact import content_key
from keeptune.core.low_rank import LowRank
from keeptune.core.target import Target
from keeptune.data.calibration import Calibration
from keeptune.data.completions import joined_knowledge
from keeptune.linalg.gram import add_gram, symmetric
from keeptune.model.pretrained import load_model, load_tokenizer
from keeptune.statistics.covariance import (
    GradientCovariance,
    LoraFisher,
    TokenCount,
    WeightFisher,
    lora_fisher,
    split_diagonals,
    tokens_per_learned,
)
from keeptune.statistics.request import Labels, RunningMean
from keeptune.statistics.store import Source

CPU = torch.device("cpu")
COUNT = TokenCount("task")
DRAWN: tuple[Labels, ...] = ("sampled", "probe")


def start(target: Target, rank: int = 3, seed: int = 0) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    B = torch.randn(target.out_features, rank, generator=draw)
    return LowRank(B, torch.randn(rank, target.in_features, generator=draw))


@pytest.mark.parametrize("labels", ["true", "sampled"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_the_diagonal_of_a_weight_is_the_mean_squared_gradient_of_texts(
    architecture: str, labels: Labels, tmp_path: Path
) -> None:
    """Per learned token: over the number of learned tokens, not of texts, batches or all tokens."""
    bench, request = Bench(MODELS[architecture](), tmp_path), WeightFisher("task", labels, seed=4)
    statistics = bench.collect(asking(request, COUNT))
    for target in bench.targets()[::3]:
        view = statistics.view(target)
        g = text_gradients(bench.model, target.name, bench.task, labels=labels, seed=4)
        g = g.mT if target.transposed else g
        wanted = g.square().sum(0) / bench.task.learned_tokens
        assert relative(view[request] * tokens_per_learned(view, COUNT), wanted) < 1e-5, target.name


@pytest.mark.parametrize("per", ["text", "token"])
@pytest.mark.parametrize("architecture", MODELS)
def test_diagonals_are_those_of_the_rows(architecture: str, per: Any, tmp_path: Path) -> None:
    """(4) and (5) written out with the rows that plain autograd gives, for weights and for factors at their start."""
    bench, s = Bench(MODELS[architecture](), tmp_path), 0.7
    for target in bench.targets()[::4]:
        init = start(target)
        weight, factors = WeightFisher("task", "true", per=per), lora_fisher("task", "true", init, s)
        bench.roles = [target.role]
        view = bench.collect(asking(weight, factors)).view(target)
        rows = rows_of(bench.model, target.name, bench.task)
        sizes = [len(ids) for ids in bench.task.sequences] if per == "text" else 1
        of_B, of_A = lora_gradients(rows.h, rows.delta, init.B, init.A, s)
        of_W = rows.delta[:, :, None] * rows.h[:, None, :]

        def squared(parts: Tensor, sizes: Any = sizes) -> Tensor:
            return torch.stack([part.sum(0).square() for part in parts.split(sizes)]).sum(0) / len(parts)

        found = split_diagonals(view[factors], target.out_features)
        assert relative(view[weight], squared(of_W)) < 1e-5
        if per == "text":
            assert relative(found.B, squared(of_B)) < 1e-5
            assert relative(found.A, squared(of_A)) < 1e-5


@pytest.mark.parametrize("architecture", ["llama", "roberta"])
def test_batches_and_padding_do_not_matter_and_a_forgotten_mask_does(architecture: str, tmp_path: Path) -> None:
    model = MODELS[architecture]()
    target = Bench(model, tmp_path).targets()[-1]
    requests = [WeightFisher("task", "sampled"), lora_fisher("task", "sampled", start(target), 2.0)]

    def collected(name: str, **options: Any) -> Any:
        bench = Bench(model, tmp_path / name, roles=[target.role])
        return bench.collect(asking(*requests), **options).view(target)

    wanted, wrong = collected("a"), collected("e", runner=RepaddingRunner(model, mask_forgotten))
    others = [
        collected("b", batch_tokens=1),
        collected("c", runner=RepaddingRunner(model, padded_left)),
        collected("d", sum_bytes=0),
    ]
    for request in requests:
        for other in others:
            assert relative(other[request], wanted[request]) < 1e-5
        assert relative(wrong[request], wanted[request]) > 1e-2


def test_at_b_zero_the_fisher_of_a_is_zero(tmp_path: Path) -> None:
    bench = Bench(MODELS["llama"](), tmp_path, roles=["v_proj"])
    target = bench.targets()[0]
    init = start(target)
    request = lora_fisher("task", "sampled", LowRank(torch.zeros_like(init.B), init.A), 1.0)
    found = split_diagonals(bench.collect(asking(request)).view(target)[request], target.out_features)
    assert not found.A.any()
    assert (found.B > 0).all()


def test_the_factors_are_part_of_the_key_by_their_content() -> None:
    target, source = Target("t", 0, "t", 4, 6, "t"), Source("m", "d", "f")

    def key(request: LoraFisher) -> str:
        return content_key(request.entry(target, source))

    first, same = (lora_fisher("task", "true", start(target), 1.0) for _ in range(2))
    assert key(first) == key(same)
    assert len({first, same}) == 1
    other = lora_fisher("task", "true", start(target, seed=1), 1.0)
    assert len({key(first), key(other), key(lora_fisher("task", "true", start(target), 2.0))}) == 3


def test_tokens_per_learned_counts_what_is_used(tmp_path: Path) -> None:
    """All tokens over the learned ones, of the examples that a request names."""
    parts = [calibration(1, (6, 9, 4)), task(2, (12, 5))]
    bench = Bench(MODELS["llama"](), tmp_path, data=joined_knowledge(parts))
    every, some = TokenCount("knowledge"), TokenCount("knowledge", examples=1)
    view = bench.collect(asking(every, some)).view(bench.targets()[0])
    assert tokens_per_learned(view, every) == 36 / (16 + 9)
    assert tokens_per_learned(view, some) == 18 / (5 + 6)


def test_kronecker_factors_are_the_fisher_where_inputs_and_gradients_are_independent() -> None:
    """One softmax layer at W = 0: δ = p - onehot(y) whatever x is, so that K-FAC is exact (6), T/N and all.

    Every x stands there once with each label (so that means are expectations), and once as a prompt token, δ = 0.
    """
    torch.manual_seed(0)
    n, m, texts = 5, 4, 30
    x = torch.randn(texts, n, dtype=torch.float64)
    p = torch.full((m,), 1 / m, dtype=torch.float64)
    exact = torch.zeros(m * n, m * n, dtype=torch.float64)
    inputs, gradients = (RunningMean((size, size), CPU, add_gram, symmetric) for size in (n, m))
    for row in x:
        for label in range(m):
            delta = p - functional.one_hot(torch.tensor(label), m)
            g = torch.outer(delta, row).reshape(-1)
            exact += torch.outer(g, g)
            inputs.add(torch.stack([row, row]))
            gradients.add(torch.stack([delta, torch.zeros_like(delta)]))
    learned, tokens = texts * m, 2 * texts * m
    Omega, Gamma = inputs.result().double(), gradients.result().double()
    assert inputs.tokens == tokens
    assert relative(tokens / learned * torch.kron(Gamma, Omega), exact / learned) < 1e-5
    logits = torch.zeros(m, dtype=torch.float64)
    E = 1e-3 * torch.randn(m, n, dtype=torch.float64)
    kl = sum(functional.kl_div((logits + E @ row).log_softmax(0), p, reduction="sum") for row in x) / texts
    form = 0.5 * tokens / learned * torch.trace(Gamma @ E @ Omega @ E.T)
    assert abs(float(form / kl) - 1) < 1e-2


@pytest.mark.parametrize("labels", DRAWN)
def test_the_drawn_fisher_is_the_second_order_of_the_divergence_per_learned_token(
    labels: Labels, tmp_path: Path
) -> None:
    """(3), on a whole model: the mean over draws of the exact diagonal, against the KL of single entries moved."""
    bench = Bench(MODELS["llama"](), tmp_path, roles=["down_proj"])
    target = bench.targets()[-1]
    request, other = (WeightFisher("task", labels, seed=seed, probes=400) for seed in range(2))
    view = bench.collect(asking(COUNT, request, other)).view(target)
    diagonal = view[request] * tokens_per_learned(view, COUNT)
    module = bench.model.get_submodule(target.name)
    places = [divmod(int(index), target.in_features) for index in view[other].flatten().topk(40).indices[::8]]

    def log_probabilities(data: Calibration) -> list[Tensor]:
        with torch.no_grad():
            return [
                bench.model(torch.tensor([ids])).logits[0, prompt - 1 : -1].double().log_softmax(-1)
                for ids, prompt in zip(data.sequences, data.prompts or (), strict=True)
            ]

    base = log_probabilities(bench.task)
    for row, column in places:
        step = 0.02
        divergence = 0.0
        for sign in (1, -1):  # both ways: the third order cancels
            with torch.no_grad():
                module.weight[row, column] += sign * step
            for p, q in zip(base, log_probabilities(bench.task), strict=True):
                divergence += 0.5 * float(functional.kl_div(q, p, reduction="sum", log_target=True))
            with torch.no_grad():
                module.weight[row, column] -= sign * step
        found = 0.5 * step**2 * float(diagonal[row, column])
        assert found / (divergence / bench.task.learned_tokens) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("labels", ["sampled", "probe", "true"])
def test_the_mean_over_draws_is_the_exact_fisher_by_enumeration(labels: Labels, tmp_path: Path) -> None:
    """Every token's gradient for every word, weighted by the model: of texts, cross terms of tokens vanish on average.

    The data's own tokens have another Fisher.
    """
    bench = Bench(MODELS["llama"](), tmp_path, task=task(lengths=(6, 9, 5)), roles=["down_proj"])
    target = bench.targets()[0]
    init, s = start(target), 0.7
    draws = {"probes": 600} if labels != "true" else {}
    weight, factors = WeightFisher("task", labels, **draws), lora_fisher("task", labels, init, s, **draws)
    view = bench.collect(asking(COUNT, weight, factors)).view(target)
    ratio = tokens_per_learned(view, COUNT)
    of_W = exact_diagonal(bench.model, target.name, bench.task, lambda G: G) / bench.task.learned_tokens
    of_B = exact_diagonal(bench.model, target.name, bench.task, lambda G: s * G @ init.A.T) / bench.task.learned_tokens
    of_A = exact_diagonal(bench.model, target.name, bench.task, lambda G: s * init.B.T @ G) / bench.task.learned_tokens
    found = split_diagonals(view[factors], target.out_features)
    errors = [relative(ratio * a, b) for a, b in ((view[weight], of_W), (found.B, of_B), (found.A, of_A))]
    assert all(error > 0.3 for error in errors) if labels == "true" else max(errors) < 0.12


def test_probes_are_nearer_to_the_fisher_than_drawn_labels_are_at_equal_cost(tmp_path: Path) -> None:
    """On atlas, which is sure of most words: labels that are drawn are seldom others, and then weigh all at once."""
    model, tokenizer = load_model(str(model_path())), load_tokenizer(str(model_path()))
    rows = [json.loads(line) for line in data_path("calibration.jsonl").read_text().splitlines()[:16]]
    texts = [f"{row['question']}\nAnswer: {row['answer']}" for row in rows]
    data = Calibration(tuple(tuple(tokenizer(text).input_ids) for text in texts), 0)
    bench = Bench(model, tmp_path, data, roles=["v_proj", "down_proj"])
    kinds = (partial(GradientCovariance, "knowledge"), partial(WeightFisher, "knowledge"))
    wanted = [kind("probe", seed=9, probes=48) for kind in kinds]
    drawn = {labels: [[kind(labels, seed=seed) for kind in kinds] for seed in range(4)] for labels in DRAWN}
    every = [request for seeds in drawn.values() for requests in seeds for request in requests]
    statistics = bench.collect(asking(*wanted, *every))
    for index in range(len(kinds)):
        squared = dict.fromkeys(DRAWN, 0.0)
        for target in bench.targets():
            view = statistics.view(target)
            for labels, seeds in drawn.items():
                squared[labels] += sum(relative(view[own[index]], view[wanted[index]]) ** 2 for own in seeds)
        assert squared["probe"] < 0.5 * squared["sampled"], kinds[index]
