from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from tests.models import MODELS, Rows, calibration, counted_passes, inputs_of
from tests.reference.statistics_reference import stacked_inputs
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from keeptune.data.calibration import Calibration
from keeptune.model.blocks import find_targets
from keeptune.model.runner import Runner, Taps

SITES = {
    "llama": "model.layers.1.mlp.down_proj",
    "qwen2": "model.layers.1.mlp.down_proj",
    "gpt2": "transformer.h.1.mlp.c_proj",
    "roberta": "roberta.encoder.layer.1.output.dense",
}
DATA = calibration(lengths=(3, 11, 7))


def sorted_rows(X: Tensor) -> Tensor:
    """Rows in an order that does not depend on batching."""
    return X[X[:, 0].argsort()]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("architecture", MODELS)
def test_a_sink_sees_each_real_token_once_and_padding_never(architecture: str, side: str) -> None:
    model, site, rows = MODELS[architecture](), SITES[architecture], Rows()
    Runner(model).run(DATA.batches(padding_side=side), Taps({site: [rows]}), title="")
    wanted = stacked_inputs(model, site, DATA).T.float()
    assert rows.stacked.shape == wanted.shape == (DATA.tokens, 48)
    torch.testing.assert_close(sorted_rows(rows.stacked), sorted_rows(wanted), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("architecture", MODELS)
def test_what_the_padding_holds_reaches_no_row(architecture: str) -> None:
    model, site = MODELS[architecture](), SITES[architecture]
    found = [inputs_of(model, [site], Calibration(DATA.sequences, pad_id=pad))[site] for pad in (0, 40)]
    assert torch.equal(*found)


def test_a_sink_is_called_once_per_batch() -> None:
    model, rows = MODELS["llama"](), Rows()
    Runner(model).run(DATA.batches(1), Taps({SITES["llama"]: [rows, rows]}), title="")
    assert [len(x) for x in rows.seen] == [11, 11, 7, 7, 3, 3]


def test_all_modules_are_watched_in_one_pass() -> None:
    model = MODELS["llama"]()
    names = [target.name for target in find_targets(model)]
    wanted = {target.name: (DATA.tokens, target.in_features) for target in find_targets(model)}
    with counted_passes(model) as count:
        found = inputs_of(model, names, DATA)
    assert {name: x.shape for name, x in found.items()} == wanted
    assert count == [1]  # of the one batch


def test_the_pass_ends_when_every_watched_module_was_reached() -> None:
    model, later = MODELS["llama"](), []
    model.model.layers[1].register_forward_pre_hook(lambda *_: later.append(1))
    Runner(model).run(DATA.batches(), Taps({"model.layers.0.mlp.up_proj": [Rows()]}), title="")
    assert later == []
    Runner(model).run(DATA.batches(), Taps({"model.layers.1.mlp.up_proj": [Rows()]}), title="")
    assert later == [1]


def fails(_: Tensor) -> None:
    raise ZeroDivisionError("mine")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("sink", [lambda _: None, fails], ids=["ends", "fails"])
@pytest.mark.parametrize("architecture", MODELS)
def test_hooks_are_gone_and_the_mode_restored_even_after_an_exception(
    architecture: str, sink: object, training: bool
) -> None:
    model = MODELS[architecture]().train(training)
    with pytest.raises(ZeroDivisionError, match="mine") if sink is fails else nullcontext():
        Runner(model).run(DATA.batches(), Taps({SITES[architecture]: [sink]}), title="")  # type: ignore[list-item]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert model.training is training


def test_dropout_is_off_and_no_gradient_is_kept() -> None:
    model = MODELS["gpt2"]().train()
    first, second = (inputs_of(model, [SITES["gpt2"]], DATA)[SITES["gpt2"]] for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad


def test_the_two_texts_of_a_pair_are_told_apart() -> None:
    """BERT marks which text a token is from; other padding must not move the marks."""
    config = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_labels=2
    )
    model = BertForSequenceClassification(config).eval()
    types = tuple((0,) * (len(ids) // 2) + (1,) * (len(ids) - len(ids) // 2) for ids in DATA.sequences)
    site = "bert.encoder.layer.1.output.dense"
    wanted = []
    handle = model.get_submodule(site).register_forward_pre_hook(lambda _, inputs: wanted.append(inputs[0][0]))
    with torch.no_grad():
        for ids, kinds in zip(DATA.sequences, types, strict=True):
            model(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([kinds]))
    handle.remove()
    pairs = Calibration(DATA.sequences, 0, labels=(0, 1, 1), types=types)
    assert pairs.fingerprint != Calibration(DATA.sequences, 0, labels=(0, 1, 1)).fingerprint
    for side in ("right", "left"):
        rows = Rows()
        Runner(model).run(pairs.batches(padding_side=side), Taps({site: [rows]}), title="")
        torch.testing.assert_close(sorted_rows(rows.stacked), sorted_rows(torch.cat(wanted)), rtol=1e-4, atol=1e-5)
    plain = inputs_of(model, [site], DATA)[site]
    assert (sorted_rows(plain) - sorted_rows(torch.cat(wanted))).abs().max() > 1e-3
