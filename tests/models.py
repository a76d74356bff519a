"""Tiny random models, calibration data and the few steps from a model to a plan that most tests need."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from keeptune.adapter.install import trained_state
from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Decision, Plan, TargetPlan
from keeptune.core.target import Target
from keeptune.core.weights import read_weight
from keeptune.data.calibration import Batch, Calibration
from keeptune.methods.base import Method, make_plan
from keeptune.model.blocks import body, find_targets, head_of
from keeptune.model.head import Head, Loss, body_fingerprint
from keeptune.model.pretrained import LoadOptions, load_model
from keeptune.model.runner import Runner, Sink, Taps
from keeptune.pipeline.planning import penalties_of, with_penalties
from keeptune.statistics.collect import Statistics, collect
from keeptune.statistics.neuron_attribution import Attributions
from keeptune.statistics.request import Request, RunningMean
from keeptune.statistics.store import StatStore

VOCAB = 64
HIDDEN = 32
Factory = Callable[..., PreTrainedModel]
_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SMALL_MIXTURE: dict[str, Any] = {**_SMALL, "num_experts_per_tok": 2}


def llama(seed: int = 0, dtype: torch.dtype = torch.float32, **extra: Any) -> PreTrainedModel:
    """Grouped queries: k_proj and v_proj have 16 outputs, the others 32 or more."""
    config = LlamaConfig(**_SMALL, intermediate_size=48, num_key_value_heads=2, **extra)
    return _seeded(LlamaForCausalLM, config, seed, dtype)


def qwen2(seed: int = 0, dtype: torch.dtype = torch.float32, **extra: Any) -> PreTrainedModel:
    """Biases in q, k and v, and a head tied to the embedding."""
    config = Qwen2Config(**_SMALL, intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=True, **extra)
    return _seeded(Qwen2ForCausalLM, config, seed, dtype)


def gpt2(seed: int = 0, dtype: torch.dtype = torch.float32, **extra: Any) -> PreTrainedModel:
    """Conv1D, which stores W as (n, m); absolute positions; dropout in training mode."""
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=HIDDEN,
        n_inner=48,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **extra,
    )
    return _seeded(GPT2LMHeadModel, config, seed, dtype)


def roberta(seed: int = 0, dtype: torch.dtype = torch.float32, **extra: Any) -> PreTrainedModel:
    """An encoder under a head of three labels; biases everywhere; positions counted from the padding id on."""
    config = RobertaConfig(
        **{**_SMALL, "max_position_embeddings": 66, "initializer_range": 0.5, "bos_token_id": 0, "pad_token_id": 1},
        intermediate_size=48,
        num_labels=3,
        **extra,
    )
    return _seeded(RobertaForSequenceClassification, config, seed, dtype)


def qwen3_moe(seed: int = 0, dtype: torch.dtype = torch.float32, **extra: Any) -> PreTrainedModel:
    """Experts in two parameters for each block: (4, 48, 32) for gate and up, (4, 32, 24) for down."""
    config = Qwen3MoeConfig(
        **_SMALL_MIXTURE,
        num_key_value_heads=2,
        head_dim=8,
        moe_intermediate_size=24,
        **{"num_experts": 4, **extra},
    )
    return _seeded(Qwen3MoeForCausalLM, config, seed, dtype)


def gpt_oss(seed: int = 0, dtype: torch.dtype = torch.float32, **extra: Any) -> PreTrainedModel:
    """Experts stored as (n, m), gate and up in turn, with biases: (4, 32, 48) and (4, 24, 32)."""
    config = GptOssConfig(
        **_SMALL_MIXTURE,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        intermediate_size=24,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **extra,
    )
    return _seeded(GptOssForCausalLM, config, seed, dtype)


def deepseek(seed: int = 0, dtype: torch.dtype = torch.float32, **extra: Any) -> PreTrainedModel:
    """A dense block below one of four routed experts and a shared one; attention through narrow maps."""
    config = DeepseekV3Config(
        **_SMALL_MIXTURE,
        num_key_value_heads=4,
        intermediate_size=40,
        moe_intermediate_size=24,
        n_routed_experts=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        **extra,
    )
    return _seeded(DeepseekV3ForCausalLM, config, seed, dtype)


MIXTURES: dict[str, Factory] = {"qwen3_moe": qwen3_moe, "gpt_oss": gpt_oss, "deepseek": deepseek}
NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": "float32",
    "bnb_4bit_use_double_quant": True,
}
MODELS: dict[str, Factory] = {"llama": llama, "qwen2": qwen2, "gpt2": gpt2, "roberta": roberta}


def deep(make: Factory, dtype: torch.dtype = torch.float32) -> Any:
    """The same architecture with four blocks: two are too few to see layers mixed up."""
    config = make().config
    fields = config.to_dict() | {"num_hidden_layers": 4, "layer_types": None}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        fresh = make.__globals__[type(make()).__name__](type(config)(**fields))
    return fresh.to(dtype).eval()


def wide(make: Factory) -> PreTrainedModel:
    """The same architecture with inputs of multiples of 64, the blocks of four-bit scales."""
    config = make().config
    sizes = {"hidden_size": 64, "n_embd": 64, "intermediate_size": 128, "n_inner": 128, "head_dim": 16}
    fields = config.to_dict()
    fields |= {key: value for key, value in sizes.items() if key in fields}
    return _seeded(type(make()), type(config)(**fields), 0, torch.float32)


def _seeded(cls: type[Any], config: Any, seed: int, dtype: torch.dtype) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = cls(config)
        with torch.no_grad():  # biases and norms start as zeros and ones, which would hide a mistake
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    start = 1.0 if "norm" in name.lower() or "ln_" in name else 0.0
                    parameter.copy_(start * (name.endswith("weight")) + 0.1 * torch.randn_like(parameter))
            # Padding looks like text, as where the end-of-text token pads: only the mask tells them apart.
            model.get_input_embeddings().weight[0].normal_(std=config.initializer_range)
    ready: PreTrainedModel = model.to(dtype).eval()
    return ready


@dataclass(frozen=True)
class Saved:
    """A model on disk, loaded afresh on demand; a classifier's head is drawn then."""

    folder: Path
    head: Head | None = None

    def load(self, seed: int = 0, quantization: dict[str, Any] | None = None) -> PreTrainedModel:
        head = None if self.head is None else dataclasses.replace(self.head, seed=seed)
        return load_model(str(self.folder), LoadOptions(head=head, quantization=quantization))


def save(model: PreTrainedModel, folder: Path) -> Saved:
    """Write a base as safetensors; of a classifier without its head, as encoders are published."""
    head = Head.of(model)
    (model if head is None else body(model)).save_pretrained(folder)
    return Saved(folder, head)


def calibration(seed: int = 0, lengths: Sequence[int] = (3, 17, 9, 24, 5, 30, 12, 21, 8, 28)) -> Calibration:
    """Random token sequences of different lengths; more tokens than any input has features."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]
    return Calibration(tuple(map(tuple, rows)), pad_id=0)


def task(seed: int = 7, lengths: Sequence[int] = (19, 6, 11, 26, 9, 14, 30, 8, 22, 16)) -> Calibration:
    """The same with a prompt of about half of each text."""
    made = calibration(seed, lengths)
    return Calibration.of_answers(made.sequences, made.pad_id, tuple(length // 2 for length in lengths))


def shard(data: Calibration, which: slice) -> Calibration:
    """Some of the texts, with what is learned of them."""
    parts = (part if part is None else part[which] for part in (data.learned, data.labels, data.types))
    return Calibration(data.sequences[which], data.pad_id, *parts)


def tokens(seed: int = 0, shape: tuple[int, int] = (4, 20)) -> Tensor:
    """Token ids without padding."""
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits without gradients, in the model's present mode, float32."""
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found.float()


def relative(a: Tensor, b: Tensor) -> float:
    """Frobenius distance over the size of b."""
    with torch.no_grad():
        return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-300))


def off_by(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((found - wanted).abs().max() / wanted.abs().max())


@dataclass
class Bench:
    """A model with its targets and data: from here to statistics and plans."""

    model: PreTrainedModel
    folder: Path
    data: Calibration = field(default_factory=calibration)
    task: Calibration = field(default_factory=task)
    roles: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if head_of(self.model):
            labels = tuple(ids[0] % self.model.config.num_labels for ids in self.task.sequences)
            self.task = Calibration(self.task.sequences, self.task.pad_id, labels=labels)

    def targets(self) -> list[Target]:
        return find_targets(self.model, self.roles)

    def collect(self, method: Method, *, runner: Runner | None = None, **options: Any) -> Statistics:
        return collect(
            runner or Runner(self.model),
            {target: method.requests(target) for target in self.targets()},
            {"knowledge": self.data, "task": self.task},
            StatStore(self.folder),
            model_fingerprint=body_fingerprint(self.model),
            **options,
        )

    def plan(
        self,
        method: Method,
        penalties: Sequence[Any] = (),
        *,
        runner: Runner | None = None,
        **options: Any,
    ) -> Plan:
        statistics = self.collect(method, runner=runner, **options)
        plan = make_plan(
            method,
            self.targets(),
            lambda target: read_weight(self.model, target),
            statistics.view,
            head=head_of(self.model),
        )
        return with_penalties(
            plan,
            penalties_of(method, penalties),
            runner or Runner(self.model),
            StatStore(self.folder),
            data={"knowledge": self.data, "task": self.task},
        )


@dataclass(frozen=True)
class _Asking:
    wanted: tuple[Request, ...]
    name: ClassVar[str] = "asking"

    def requests(self, target: Target) -> frozenset[Request]:
        return frozenset(self.wanted)


def asking(*wanted: Request) -> Any:
    """Something that has nothing but requests, the same of every target."""
    return _Asking(wanted)


@dataclass(frozen=True)
class RepaddingRunner(Runner):
    """Changes each batch before it is run: other padding, a forgotten mask."""

    change: Callable[[Batch], Batch] = lambda batch: batch

    def run(self, batches: Sequence[Batch], taps: Taps, loss: Loss | None = None, **more: Any) -> None:
        super().run([self.change(batch) for batch in batches], taps, loss, **more)


def padded_left(batch: Batch) -> Batch:
    """The same rows with the padding in front."""
    lengths = batch.attention_mask.sum(1).tolist()
    turn = [batch.attention_mask.shape[1] - length for length in lengths]

    def turned(rows: Tensor) -> Tensor:
        return torch.stack([row.roll(by) for row, by in zip(rows, turn, strict=True)])

    learned = None if batch.loss_mask is None else turned(batch.loss_mask)
    return dataclasses.replace(
        batch, input_ids=turned(batch.input_ids), attention_mask=turned(batch.attention_mask), loss_mask=learned
    )


def mask_forgotten(batch: Batch) -> Batch:
    """The same tokens with padding taken for text."""
    return dataclasses.replace(batch, attention_mask=torch.ones_like(batch.attention_mask))


class Rows:
    """A sink that keeps what it was given."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, rows: Tensor) -> None:
        self.seen.append(rows.clone())

    @property
    def stacked(self) -> Tensor:
        return torch.cat(self.seen)


def inputs_of(model: PreTrainedModel, names: Sequence[str], data: Calibration) -> dict[str, Tensor]:
    """Every real token's input row at the named modules, ``(N, n)``, by the library's runner."""
    kept = {name: Rows() for name in names}
    sinks: dict[str, list[Sink]] = {name: [rows] for name, rows in kept.items()}
    Runner(model).run(data.batches(), Taps(sinks), title="")
    return {name: rows.stacked for name, rows in kept.items()}


def handmade_plan(
    model: PreTrainedModel,
    *,
    ranks: Sequence[int] = (2, 5, 3, 7),
    scales: Sequence[float] = (1.0, 0.5, 2.0),
    anchored: bool = True,
    trainable: Sequence[str] = ("A", "B"),
) -> Plan:
    """A plan with another rank and scale at every target, from no method."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for index, target in enumerate(find_targets(model)):
        rank = ranks[index % len(ranks)]
        B = torch.randn(target.out_features, rank, generator=generator) * 0.2
        rows.append(
            TargetPlan(
                target=target,
                decision=Decision(rank),
                init=LowRank(
                    B=B if anchored else torch.zeros_like(B),
                    A=torch.randn(rank, target.in_features, generator=generator) * 0.2,
                ),
                scale=scales[index % len(scales)],
                trainable=frozenset(trainable),  # type: ignore[arg-type]
            )
        )
    head = {"modules_to_save": list(head_of(model))} if head_of(model) else {}
    return Plan(method="by-hand", options={}, targets=tuple(rows), peft=head)


def labels_for(model: Any, ids: Tensor) -> Tensor:
    """What a model may be trained to say of token ids: the next tokens, or a label each."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return ids[:, 0] % base.config.num_labels if head_of(base) else ids


def head_parameters(model: Any, plan: Plan) -> set[str]:
    """Names of the parameters of an installed classifier's trained head."""
    heads = tuple(f"base_model.model.{name}.modules_to_save.default." for name in plan.peft.get("modules_to_save", ()))
    return {name for name, _ in model.named_parameters() if name.startswith(heads)}


def train_steps(model: Any, *, steps: int = 5, seed: int = 3, rate: float = 1e-2, everything: bool = False) -> None:
    """AdamW with weight decay on random tokens, without dropout; ``everything`` hands it frozen parameters too."""
    parameters = [p for p in model.parameters() if everything or p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.1)
    for step in range(steps):
        ids = tokens(seed + step)
        optimiser.zero_grad()
        model(input_ids=ids, labels=labels_for(model, ids)).loss.backward()
        optimiser.step()


def copies(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter, by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@contextmanager
def counted_passes(model: PreTrainedModel) -> Iterator[list[int]]:
    """Count how often the model's embedding is used, that is, forward passes."""
    count = [0]

    def hook(*_: Any) -> None:
        count[0] += 1

    handle = model.get_input_embeddings().register_forward_hook(hook)
    try:
        yield count
    finally:
        handle.remove()


def names_in(folder: Path) -> list[str]:
    """What lies in a folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())


def full_disk(*_: Any, **__: Any) -> None:
    """Stand in for any call that writes."""
    raise OSError(errno.ENOSPC, "No space left on device")


class GivenStats(dict[Any, Tensor]):
    """Statistics at hand, with the interface of a StatsView."""

    def derive(self, request: Any, function: Callable[..., Any], *options: Any) -> Any:
        return function(self[request], *options)


def trained_factors(model: Any, plan: Plan) -> dict[str, LowRank]:
    """Each target's A and B as they are now."""
    state = trained_state(model, plan)
    names = [target_plan.target.name for target_plan in plan.targets]
    return {name: LowRank(B=state[f"{name}.B"], A=state[f"{name}.A"]) for name in names}


def add_up(total: RunningMean, other: RunningMean) -> None:
    """Adds the rows of another sum, as processes do."""
    total.total += other.total
    total.tokens += other.tokens


def in_memory(values: Tensor) -> Attributions:
    """Attributions ``(N, L, D)`` that are in memory, of blocks 0 to L - 1."""
    samples, blocks, nodes = values.shape
    names = tuple(f"block {layer}" for layer in range(blocks))
    return Attributions(tuple(range(blocks)), nodes, samples, lambda sample: values[sample], names)
