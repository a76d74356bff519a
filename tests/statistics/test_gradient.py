"""Gradient statistics against autograd one text at a time, and what they must not depend on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import MODELS, Bench, RepaddingRunner, asking, mask_forgotten, padded_left, relative, task
from tests.reference.gradient_reference import rows_of
from torch import Tensor

from keeptune.core.errors import StatisticsError
from keeptune.core.weights import read_weight
from keeptune.data.calibration import Batch, Calibration
from keeptune.linalg.decompositions import exact_svd
from keeptune.model.head import Loss, drawn_labels, summed_loss
from keeptune.model.runner import Runner, Taps
from keeptune.statistics.collect import Statistics
from keeptune.statistics.covariance import DirectionVariances, GradientCovariance, InputCovariance
from keeptune.statistics.request import Request

INPUT, GRADIENT = InputCovariance("task"), GradientCovariance("task", "true")
DIRECTIONS = DirectionVariances("task", "true")
SAMPLED, PROBED = GradientCovariance("task", "sampled"), GradientCovariance("task", "probe", probes=2)


def collected(bench: Bench, *wanted: Request, **options: Any) -> Statistics:
    return bench.collect(asking(*wanted), **options)


@pytest.mark.parametrize("architecture", MODELS)
def test_all_statistics_equal_autograd_one_text_at_a_time(architecture: str, tmp_path: Path) -> None:
    bench = Bench(MODELS[architecture](), tmp_path)
    statistics = collected(bench, INPUT, GRADIENT, DIRECTIONS)
    for target in bench.targets():
        view, rows = statistics.view(target), rows_of(bench.model, target.name, bench.task)
        n = rows.h.shape[0]
        assert n == bench.task.tokens
        U, _, Vh = exact_svd(read_weight(bench.model, target), target.name)
        along = torch.stack([(rows.h @ Vh.T).square().mean(0), (rows.delta @ U).square().mean(0)])
        assert relative(view[INPUT], rows.h.T @ rows.h / n) < 1e-5
        assert relative(view[GRADIENT], rows.delta.T @ rows.delta / n) < 1e-5
        assert relative(view[DIRECTIONS][0], along[0]) < 1e-5
        assert relative(view[DIRECTIONS][1], along[1]) < 1e-5


@pytest.mark.parametrize("architecture", ["llama", "roberta"])
def test_batches_and_padding_do_not_matter_and_a_forgotten_mask_does(architecture: str, tmp_path: Path) -> None:
    model, requests = MODELS[architecture](), (GRADIENT, DIRECTIONS, SAMPLED, PROBED)
    wanted = collected(Bench(model, tmp_path / "a"), *requests)
    alone = collected(Bench(model, tmp_path / "b"), *requests, batch_tokens=1)
    left = collected(Bench(model, tmp_path / "c"), *requests, runner=RepaddingRunner(model, padded_left))
    wrong = collected(Bench(model, tmp_path / "d"), *requests, runner=RepaddingRunner(model, mask_forgotten))
    frugal = collected(Bench(model, tmp_path / "e"), *requests, sum_bytes=0)
    for target in Bench(model, tmp_path).targets():
        for request in requests:
            value = wanted.view(target)[request]
            for other in (alone, left, frugal):
                assert relative(other.view(target)[request], value) < 1e-5, (target.name, request)
            assert relative(wrong.view(target)[request], value) > 1e-2, (target.name, request)


def test_gradients_of_a_classifier_depend_on_its_head_and_its_labels(tmp_path: Path) -> None:
    """Both are part of the key, so that nothing is taken from the store that was made with another one."""
    model = MODELS["roberta"]()
    first = Bench(model, tmp_path)
    wanted = collected(first, GRADIENT)
    other = Bench(model, tmp_path)
    assert other.task.labels is not None
    other.task = Calibration(other.task.sequences, 0, labels=tuple((label + 1) % 3 for label in other.task.labels))
    changed = MODELS["roberta"]()
    with torch.no_grad():
        changed.classifier.out_proj.weight.neg_()
    target = first.targets()[-1]
    for bench in (other, Bench(changed, tmp_path)):
        found = collected(bench, GRADIENT)
        assert relative(found.view(target)[GRADIENT], wanted.view(target)[GRADIENT]) > 1e-2
    knowledge = InputCovariance("knowledge")
    stored = len(list(tmp_path.rglob("recipe.json")))
    collected(first, knowledge)
    entries = len(list(tmp_path.rglob("recipe.json")))
    collected(Bench(changed, tmp_path), knowledge)
    assert len(list(tmp_path.rglob("recipe.json"))) == entries > stored


def test_a_classifier_needs_labels(tmp_path: Path) -> None:
    bench = Bench(MODELS["roberta"](), tmp_path)
    bench.task = task()
    with pytest.raises(StatisticsError, match="texts without labels for a classifier"):
        collected(bench, GRADIENT)


def test_one_sweep_serves_inputs_and_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, passes = Bench(MODELS["llama"](), tmp_path), []
    plain = Runner.run

    def run(self: Runner, batches: Any, taps: Taps, loss: Loss | None = None, **more: Any) -> None:
        passes.append(loss is not None)
        plain(self, batches, taps, loss, **more)

    monkeypatch.setattr(Runner, "run", run)
    collected(bench, INPUT, GRADIENT, DIRECTIONS)
    assert passes == [True]
    collected(bench, INPUT, GRADIENT, DIRECTIONS)
    assert passes == [True]
    collected(bench, SAMPLED)
    assert passes == [True, True]


def test_the_model_is_given_back_as_it_was(tmp_path: Path) -> None:
    bench = Bench(MODELS["gpt2"]().train(), tmp_path)  # dropout, were it not in evaluation mode
    first = next(bench.model.parameters())
    first.requires_grad_(False)
    asked = {name: p.requires_grad for name, p in bench.model.named_parameters()}
    again = Bench(MODELS["gpt2"](), tmp_path / "other")
    for target in bench.targets():
        found, wanted = (collected(b, GRADIENT).view(target)[GRADIENT] for b in (bench, again))
        assert torch.equal(found, wanted)
    assert bench.model.training
    assert {name: p.requires_grad for name, p in bench.model.named_parameters()} == asked
    assert all(p.grad is None for p in bench.model.parameters())


def test_what_is_learned_is_part_of_the_key(tmp_path: Path) -> None:
    """The same texts with other prompts have other gradients."""
    made = task()
    assert made.prompts is not None
    other = Calibration.of_answers(made.sequences, made.pad_id, tuple(p - 1 for p in made.prompts))
    turned = Calibration.of_answers(made.sequences[::-1], made.pad_id, made.prompts[::-1])
    assert len({made.fingerprint, other.fingerprint, Calibration(made.sequences, made.pad_id).fingerprint}) == 3
    assert turned.fingerprint == made.fingerprint


def test_of_knowledge_without_prompts_the_whole_text_is_learned(tmp_path: Path) -> None:
    """All tokens but the first, as if each prompt were empty or the first token."""
    model, request = MODELS["llama"](), GradientCovariance("knowledge", "true")
    texts = task().sequences
    found = [
        collected(
            Bench(
                model,
                tmp_path / str(index),
                data=Calibration(texts, 0) if prompts is None else Calibration.of_answers(texts, 0, prompts),
            ),
            request,
        )
        for index, prompts in enumerate([None, (0,) * len(texts), (1,) * len(texts), (2,) * len(texts)])
    ]
    for target in Bench(model, tmp_path).targets():
        whole, empty, first, second = (statistics.view(target)[request] for statistics in found)
        assert torch.equal(empty, whole)
        assert torch.equal(first, whole)
        if target.role not in ("q_proj", "k_proj"):  # the first token attends to itself whatever they say
            assert relative(second, whole) > 1e-3


def test_what_is_no_number_names_the_module_and_the_batch(tmp_path: Path) -> None:
    """Of gradients too, and of the first module that meets it."""
    model = MODELS["llama"]()
    data = Calibration(((3, 4, 5), (6, 7, 8, 9), (10, 11)), 0)
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = float("inf")
    with pytest.raises(StatisticsError, match=r"layers\.0\..*: got NaN or infinite inputs in batch 1 of 3, wanted"):
        collected(Bench(model, tmp_path / "a", data=data), InputCovariance("knowledge"), batch_tokens=1)
    model, last = MODELS["llama"](), Bench(MODELS["llama"](), tmp_path).targets()[-1].name
    model.lm_head.register_full_backward_hook(lambda *_: (torch.full((1, 2, 32), float("nan")),))
    with pytest.raises(StatisticsError, match=r"NaN or infinite gradients in batch 1 of 1") as caught:
        collected(
            Bench(model, tmp_path / "b", data=Calibration(((10, 11),), 0)), GradientCovariance("knowledge", "true")
        )
    assert caught.value.where == last


# Labels


def one_batch(*sequences: tuple[int, ...], prompt: int = 1) -> Batch:
    (batch,) = Calibration.of_answers(sequences, 0, (prompt,) * len(sequences)).batches()
    return batch


def test_the_loss_of_a_batch_is_the_sum_of_the_losses_of_its_texts() -> None:
    model = MODELS["llama"]()
    texts = [(5, 9, 11, 20), (7, 30, 8), (4, 6, 9, 33, 12, 10)]

    def loss(*sequences: tuple[int, ...]) -> Tensor:
        batch = one_batch(*sequences, prompt=2)
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return summed_loss(logits, batch, Loss("true"))

    torch.testing.assert_close(loss(*texts), torch.stack([loss(text) for text in texts]).sum())


def test_drawn_labels_follow_the_model_and_their_seed() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0]).repeat(1, 1)
    batch = one_batch((3, 1))
    learned = torch.ones(1, 1, dtype=torch.bool)
    found = torch.cat([drawn_labels(logits, batch, learned, seed) for seed in range(4000)])
    shares = torch.bincount(found, minlength=4) / len(found)
    assert (shares - logits[0].softmax(0)).abs().max() < 0.03
    assert drawn_labels(logits, batch, learned, 5).equal(drawn_labels(logits, batch, learned, 5))


def test_a_label_that_the_model_excludes_is_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    learned = torch.ones(1, 1, dtype=torch.bool)
    found = [int(drawn_labels(logits, one_batch((2, 2)), learned, seed)) for seed in range(50)]
    assert set(found) == {1}
