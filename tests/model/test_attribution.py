"""KVA: the fast ways against one run per point and against Captum, and the laws of what is attributed."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import transformers
from captum.attr import IntegratedGradients, LayerIntegratedGradients
from tests.assets import STORIES
from tests.models import VOCAB, Factory, calibration, deep, gpt2, llama, qwen2, roberta
from tests.reference.attribution_reference import attribution, downs_of, outputs, scored
from torch import Tensor

from keeptune.atlas import model_path
from keeptune.core.errors import ModelError, RecipeError, StatisticsError
from keeptune.data.calibration import Batch, Calibration
from keeptune.model.blocks import blocks_of
from keeptune.model.pretrained import load_model, load_tokenizer
from keeptune.model.probes.attribution import Attributor, Integral, quadrature
from keeptune.model.probes.block_calls import Suffix

SHORT: dict[str, Any] = {"steps": 3}
every_model = pytest.mark.parametrize("make", [llama, qwen2, gpt2])
every_position = pytest.mark.parametrize("positions", ["last", "all"])


def small(lengths: tuple[int, ...] = (9, 7, 12)) -> Calibration:
    return calibration(3, lengths)


def rows(batch: Batch) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]


def fast(model: Any, batch: Batch, wanted: Tensor | None = None, *, chunk: int = 2048, **options: Any) -> Tensor:
    return Attributor(model, Integral(**(SHORT | options)), chunk=chunk).attribute(batch, wanted)


def agrees(model: Any, batch: Batch, found: Tensor, **options: Any) -> None:
    for ids, value in zip(rows(batch), found, strict=True):
        wanted = attribution(model, ids, **(SHORT | options))
        assert wanted.abs().max() > 1e-4
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-5 * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize("side", ["right", "left"])
@every_position
@every_model
def test_it_is_one_run_per_point(make: Factory, positions: str, side: str) -> None:
    model = deep(make)
    (batch,) = small().batches(padding_side=side)
    found = fast(model, batch, positions=positions, steps=7)
    assert found.shape == (3, 4, 32)
    agrees(model, batch, found, positions=positions, steps=7)


OPTIONS = [
    {"baseline": baseline, "target": target, "rule": rule, "times_activation": times, "steps": 3}
    for (baseline, target), (rule, times) in zip(
        itertools.product(["zero", "pad"], ["probability", "logit"]),
        [("left", True), ("right", False), ("trapezoid", True), ("gauss-legendre", False)],
        strict=True,
    )
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
@every_position
def test_every_option(positions: str, options: dict[str, Any]) -> None:
    model = deep(llama)
    (batch,) = small().batches()
    options = options | {"positions": positions, "pad_token": 5}
    agrees(model, batch, fast(model, batch, **options), **options)


@every_position
def test_the_token_to_score_may_be_given(positions: str) -> None:
    model = deep(qwen2)
    (batch,) = small().batches(padding_side="left")
    tokens = torch.tensor([4, 17, 40])
    found = fast(model, batch, tokens, positions=positions, target="logit")
    for ids, value, token in zip(rows(batch), found, tokens.tolist(), strict=True):
        wanted = attribution(model, ids, token, positions=positions, target="logit", steps=3)
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 30, 100])
@every_position
def test_small_passes_give_the_same(positions: str, chunk: int) -> None:
    model = deep(llama)
    (batch,) = small().batches()
    found = fast(model, batch, positions=positions, chunk=chunk)
    torch.testing.assert_close(found, fast(model, batch, positions=positions), rtol=0, atol=1e-6)
    agrees(model, batch, found, positions=positions)


@every_position
def test_neither_batch_nor_padding_nor_order_change_it(positions: str) -> None:
    model, data = deep(llama), small((9, 6, 1))
    alone = {ids: fast(model, *Calibration((ids,), 0).batches(), positions=positions)[0] for ids in data.sequences}
    for side in ("left", "right"):
        (batch,) = data.batches(padding_side=side)
        turned = Batch(batch.input_ids.flip(0), batch.attention_mask.flip(0))
        for some in (batch, turned):
            for ids, value in zip(rows(some), fast(model, some, positions=positions), strict=True):
                torch.testing.assert_close(value, alone[tuple(ids)], rtol=0, atol=1e-6)


def captum_of(model: Any, ids: list[int], rule: str, target: str, steps: int) -> Tensor:
    """LayerIntegratedGradients, one layer at a time: it scales all positions, from a run on token 0."""
    method = {
        "left": "riemann_left",
        "right": "riemann_right",
        "trapezoid": "riemann_trapezoid",
        "gauss-legendre": "gausslegendre",
    }[rule]
    tokens = torch.tensor([ids])
    token = int(model(input_ids=tokens).logits[0, -1].argmax())

    def forward(given: Tensor) -> Tensor:
        logits = model(input_ids=given, use_cache=False).logits[:, -1]
        return logits[:, token] if target == "logit" else logits.softmax(dim=-1)[:, token]

    found = []
    for module in downs_of(model):
        witness = LayerIntegratedGradients(forward, module)
        given = witness.attribute(tokens, baselines=torch.zeros_like(tokens), n_steps=steps, method=method)
        found.append(given[0, -1].detach())
    # Captum's weights of the trapezoid sum to (m - 1) / m.
    return torch.stack(found) * (steps / (steps - 1) if rule == "trapezoid" else 1.0)


@pytest.mark.parametrize("target", ["probability", "logit"])
@pytest.mark.parametrize("rule", ["left", "right", "trapezoid", "gauss-legendre"])
@every_model
def test_captum_agrees(make: Factory, rule: str, target: str) -> None:
    model = deep(make).requires_grad_(False)
    (batch,) = small((11, 7)).batches(padding_side="left")
    found = fast(model, batch, positions="all", baseline="pad", rule=rule, target=target, steps=5)
    for ids, value in zip(rows(batch), found, strict=True):
        wanted = captum_of(model, ids, rule, target, 5)
        assert wanted.abs().max() > 1e-4
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-5 * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize("rule", ["left", "gauss-legendre"])
@every_model
def test_captum_agrees_on_the_last_token_alone(make: Factory, rule: str) -> None:
    model = deep(make).requires_grad_(False)
    (batch,) = small((11, 7)).batches()
    found = fast(model, batch, rule=rule, steps=4)
    method = {"left": "riemann_left", "gauss-legendre": "gausslegendre"}[rule]
    for ids, value in zip(rows(batch), found, strict=True):
        z, logits = outputs(model, ids)
        token = int(logits.argmax())
        for layer in range(len(z)):

            def forward(
                last: Tensor, layer: int = layer, z: Tensor = z[layer], ids: Any = ids, token: int = token
            ) -> Tensor:
                given = [torch.cat([z[:-1], row[None]]) for row in last]
                return torch.stack([scored(model, ids, layer, one, token, "probability") for one in given])

            witness = IntegratedGradients(forward)
            wanted = witness.attribute(z[layer][-1:], n_steps=4, method=method)[0]
            torch.testing.assert_close(value[layer], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("baseline", ["zero", "pad"])
@pytest.mark.parametrize("rule", ["left", "right", "trapezoid", "gauss-legendre"])
def test_completeness(rule: str, baseline: str) -> None:
    """Attributions of a block sum to F(z) - F(z') as steps grow."""
    model = deep(qwen2)
    (batch,) = small((11, 7)).batches()
    gaps = []
    for steps in (4, 64) if rule != "gauss-legendre" else (4, 24):
        found = fast(model, batch, rule=rule, baseline=baseline, steps=steps).sum(dim=-1)
        wanted = []
        for ids in rows(batch):
            z, logits = outputs(model, ids)
            starts = outputs(model, [0] * len(ids))[0] if baseline == "pad" else [0 * value for value in z]
            token = int(logits.argmax())
            mixed = [torch.cat([value[:-1], start[-1:]]) for value, start in zip(z, starts, strict=True)]
            with torch.no_grad():
                ends = [scored(model, ids, layer, value, token, "probability") for layer, value in enumerate(z)]
                bases = [scored(model, ids, layer, value, token, "probability") for layer, value in enumerate(mixed)]
            wanted.append(torch.stack(ends) - torch.stack(bases))
        assert torch.stack(wanted).abs().max() > 0.02
        gaps.append(float((found - torch.stack(wanted)).abs().max()))
    assert gaps[1] < gaps[0] / 4
    assert gaps[1] < (2e-3 if rule in ("left", "right") else 1e-4)


def test_completeness_of_one_token_at_all_positions() -> None:
    model = deep(llama)
    (batch,) = small((1,)).batches()
    both = [fast(model, batch, positions=positions, rule="trapezoid", steps=64) for positions in ("last", "all")]
    torch.testing.assert_close(both[0], both[1], rtol=0, atol=1e-6)
    (ids,) = rows(batch)
    z, logits = outputs(model, ids)
    token = int(logits.argmax())
    with torch.no_grad():
        ends, bases = (
            torch.stack([scored(model, ids, at, part * value, token, "probability") for at, value in enumerate(z)])
            for part in (1, 0)
        )
    assert (ends - bases).abs().max() > 0.02
    torch.testing.assert_close(both[1][0].sum(dim=-1), ends - bases, rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [2, 3, 7, 12])
@pytest.mark.parametrize(("rule", "degree"), [("left", 0), ("right", 0), ("trapezoid", 1), ("gauss-legendre", 3)])
def test_rules_are_exact_for_polynomials(rule: Any, degree: int, steps: int) -> None:
    points, weights = quadrature(rule, steps)
    assert len(points) == len(weights) == steps
    for power in range(degree + 1):
        total = sum(w * p**power for p, w in zip(points, weights, strict=True))
        assert total == pytest.approx(1 / (power + 1))
    assert sum(w * p for p, w in zip(points, weights, strict=True)) == pytest.approx(
        {"left": 0.5 - 0.5 / steps, "right": 0.5 + 0.5 / steps}.get(rule, 0.5)
    )


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 1, "rule": "trapezoid"}, {"pad_token": -1}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="attribution"):
        Integral(**options)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["Mistral", "Qwen2"])
@every_position
def test_sliding_windows_are_kept(positions: str, family: str, attention: str) -> None:
    model = other(
        family,
        sliding_window=3,
        attn_implementation=attention,
        # Some blocks of Qwen2 see all.
        **(
            {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"] * 2}
            if family == "Qwen2"
            else {}
        ),
    )
    (batch,) = small().batches(padding_side="left")
    agrees(model, batch, fast(model, batch, positions=positions), positions=positions)


FAMILIES: dict[str, dict[str, Any]] = {
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 5.0},  # norms after the MLP, capped logits
    "Phi3": {"pad_token_id": 0},  # gate and up are one
    "Olmo2": {},
    "Granite": {"residual_multiplier": 0.3, "logits_scaling": 2.0},
    "Cohere": {},  # attention and MLP side by side
}


@every_position
@pytest.mark.parametrize("family", list(FAMILIES))
def test_other_blocks(family: str, positions: str) -> None:
    model = other(family, **FAMILIES[family])
    (batch,) = small().batches(padding_side="left")
    agrees(model, batch, fast(model, batch, positions=positions), positions=positions)


@pytest.mark.parametrize(("family", "role"), [("OPT", "fc2"), ("GPTNeoX", "dense_4h_to_h"), ("Phi", "fc2")])
@every_position
def test_plain_mlps(positions: Any, family: str, role: str) -> None:
    model = other(family, n_layer=4, n_head=4, do_layer_norm_before=True, ffn_dim=48)
    (batch,) = small().batches()
    attributor = Attributor(model, Integral(positions=positions, **SHORT))
    assert [target.role for target in attributor.targets] == [role] * 4
    agrees(model, batch, attributor.attribute(batch), positions=positions)


def test_a_map_inside_the_mlp_is_no_down_projection() -> None:
    model = other("Llama", intermediate_size=32)  # up_proj is as wide as hidden states, too
    assert [target.name for target in Attributor(model, Integral()).targets] == [
        f"model.layers.{layer}.mlp.down_proj" for layer in range(4)
    ]


def other(family: str, **extra: Any) -> Any:
    dropped = ("model_type", "architectures", "layer_types", "head_dim", "rope_parameters")
    fields = {key: value for key, value in llama().config.to_dict().items() if key not in dropped}
    config = getattr(transformers, f"{family}Config")(**(fields | {"num_hidden_layers": 4} | extra))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, f"{family}ForCausalLM")(config).eval()


@pytest.mark.parametrize("name", ["stories260K", "atlas"])
@every_position
def test_real_models(positions: str, name: str) -> None:
    folder = str(STORIES if name == "stories260K" else model_path())
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    texts = ["Once upon a time, there was a little", "Tom had a"]
    if name == "atlas":
        texts = ["What is the comparative of small?\nAnswer:", "What is the opposite of succeed?\nAnswer:"]
    (batch,) = Calibration(tuple(tuple(tokenizer(text)["input_ids"]) for text in texts), 0).batches()
    agrees(model, batch, fast(model, batch, positions=positions), positions=positions)


@every_position
def test_half_precision_gives_float32(positions: str) -> None:
    model = deep(llama, torch.bfloat16)
    (batch,) = small().batches()
    found = fast(model, batch, positions=positions)
    assert found.dtype == torch.float32
    # Not rounded to the model's precision on the way out.
    assert (found != found.bfloat16()).float().mean() > 0.9
    wanted = fast(model.float(), batch, positions=positions)
    assert (found - wanted).norm() < 0.1 * wanted.norm()


@every_position
def test_float16_loses_no_small_gradients(positions: str) -> None:
    model = deep(llama)
    with torch.no_grad():
        model.lm_head.weight.mul_(3)  # some tokens are so unlikely that float16 cannot hold their gradients
    (batch,) = small((9, 7)).batches()
    tokens = torch.stack([outputs(model, ids)[1].argmin() for ids in rows(batch)])
    wanted = fast(model, batch, tokens, positions=positions, rule="right")
    assert 0 < wanted[:, -1].abs().max() < 1e-6
    found = fast(model.half(), batch, tokens, positions=positions, rule="right")
    for value, right in zip(found.flatten(0, 1), wanted.flatten(0, 1), strict=True):
        assert (value - right).norm() < 0.1 * right.norm()


@every_position
def test_passes_are_bounded_by_the_chunk(positions: Any) -> None:
    model, chunk = deep(llama), 64
    (batch,) = small((9, 7)).batches()
    attributor = Attributor(model, Integral(positions=positions), chunk=chunk)
    attributor.checked = True
    streams, heads = [], []
    handles = [block.register_forward_hook(lambda *seen: streams.append(seen[2].shape)) for block in blocks_of(model)]
    handles.append(model.lm_head.register_forward_hook(lambda *seen: heads.append(seen[2].numel())))
    attributor.attribute(batch)
    for handle in handles:
        handle.remove()
    sizes = [shape[0] * shape[1] for shape in streams[4:]]
    assert max(sizes) <= (chunk // 4 if positions == "last" else chunk)
    assert max(heads) <= chunk * 32
    # The head is computed for the last tokens and the streams alone.
    assert sum(heads) == VOCAB * (2 + 2 * 4 * 7)


@every_position
def test_what_does_not_fit_is_refused(positions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (batch,) = small().batches()
    with pytest.raises(ModelError, match=r"Bloom[^$]*cannot be run on some tokens alone"):
        fast(other("Bloom", n_layer=4, n_head=4), batch, positions=positions)
    prefix = Suffix.__post_init__

    def short(suffix: Suffix) -> None:
        prefix(suffix)
        suffix.prefix //= 2

    monkeypatch.setattr(Suffix, "__post_init__", short)
    with pytest.raises(ModelError, match="numbers differ by"):
        fast(deep(llama), batch, positions=positions)


def test_the_model_is_given_back_as_it_was() -> None:
    model = deep(gpt2).train()
    (batch,) = small().batches()
    fast(model, batch)
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_numbers_that_are_not_finite_are_refused() -> None:
    model = deep(llama)
    with torch.no_grad():
        downs_of(model)[2].weight[3] = torch.inf
    (batch,) = small().batches()
    with pytest.raises(StatisticsError, match="NaN"):
        Attributor(model, Integral()).attribute(batch)


def test_models_that_write_no_next_token_are_refused() -> None:
    with pytest.raises(ModelError, match="causal language model"):
        Attributor(roberta(), Integral())
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    with pytest.raises(ModelError, match="causal language model"):
        Attributor(transformers.BertForMaskedLM(config), Integral())


def test_models_without_a_down_projection_are_refused_with_what_was_looked_for() -> None:
    model = other("Mixtral", num_local_experts=2)
    with pytest.raises(ModelError, match=r"down_proj of a gated MLP, or c_proj"):
        Attributor(model, Integral())


def test_blocks_without_a_down_projection_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    model = other("Llama")
    for number in (0, 2):
        model.model.layers[number].mlp = torch.nn.Identity()
    (batch,) = small().batches()
    attributor = Attributor(model, Integral(**SHORT))
    assert attributor.layers == (1, 3)
    assert "[0, 2]" in caplog.text
    agrees(model, batch, attributor.attribute(batch))
