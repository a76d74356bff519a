"""Train atlas from scratch: tokenizer, data files and a LlamaForCausalLM that knows some thousand facts.

    python -m studies.atlas.pretrain --relations relations.jsonl --out DIR

writes ``DIR/model`` and ``DIR/data``.  Everything drawn comes from generators made with ``--seed``.  The
weights are stored in float16 and read back as float32; the accuracy printed at the end is measured on the
stored model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from .facts import (
    HELD_WORDING,
    Fact,
    choose_facts,
    data_rows,
    divide,
    read_facts,
    write_data,
)
from .score import exact_match

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


@dataclass(frozen=True)
class Settings:
    """Size of the model and course of the training."""

    seed: int = 7
    width: int = 192
    inner: int = 512
    layers: int = 4
    heads: int = 6
    key_heads: int = 2
    pieces: int = 3072
    positions: int = 512
    steps: int = 1150
    tokens: int = 4096
    rate: float = 3e-3
    decay: float = 0.05
    warmup: int = 60
    reading: float = 0.12
    facts: int | None = None
    threads: int = 2


def statement_wordings(fact: Fact, held: set[Fact]) -> tuple[int, ...]:
    """The wordings in which pretraining may state ``fact``."""
    return tuple(w for w in range(3) if w != HELD_WORDING or fact not in held)


def corpus(facts: Sequence[Fact], held: set[Fact]) -> list[str]:
    """Every question with its answer and every statement, once: what the tokenizer is trained on."""
    texts = []
    for fact in facts:
        texts.append(f"{fact.prompt} {fact.answer}")
        texts.extend(fact.statement(wording) for wording in statement_wordings(fact, held))
    return texts


def train_tokenizer(texts: Sequence[str], pieces: int) -> Any:
    """A byte-level BPE tokenizer with single digits, ``<s>`` put in front of every text."""
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=pieces,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    wrapped: Any = PreTrainedTokenizerFast
    return wrapped(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )


def new_model(settings: Settings, tokenizer: Any) -> Any:
    """An untrained model whose weights are drawn from a generator with the seed of ``settings``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        intermediate_size=settings.inner,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.key_heads,
        max_position_embeddings=settings.positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    draws = torch.Generator().manual_seed(settings.seed)
    residual = 0.02 / math.sqrt(2 * settings.layers)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                weight.normal_(0.0, residual if last else 0.02, generator=draws)
    return model


class Reader:
    """Endless seeded batches: every pass asks each fact once and states it once, in changing wordings."""

    def __init__(self, facts: Sequence[Fact], held: set[Fact], tokenizer: Any, settings: Settings) -> None:
        """Tokenise all the texts of ``facts`` once, for reuse in every pass."""
        self._facts = list(facts)
        self._held = held
        self._settings = settings
        self._draws = random.Random(settings.seed + 11)
        self._pad = int(tokenizer.pad_token_id)
        end = [int(tokenizer.eos_token_id)]

        def encode(texts: list[str]) -> list[list[int]]:
            return [ids + end for ids in tokenizer(texts)["input_ids"]]

        self._asked = encode([f"{f.prompt} {f.answer}" for f in self._facts])
        self._stated = [encode([f.statement(w) for w in range(3)]) for f in self._facts]
        self._read = [encode([f"{f.statement(w)}\n{f.prompt} {f.answer}" for w in range(3)]) for f in self._facts]

    def _texts(self) -> list[list[int]]:
        texts = []
        for index, fact in enumerate(self._facts):
            wordings = statement_wordings(fact, self._held)
            texts.append(self._asked[index])
            texts.append(self._stated[index][self._draws.choice(wordings)])
            if self._draws.random() < self._settings.reading:
                texts.append(self._read[index][self._draws.choice(wordings)])
        self._draws.shuffle(texts)
        return texts

    def _batches(self, texts: list[list[int]]) -> list[list[list[int]]]:
        """``texts`` in groups of like length, each at most ``tokens`` tokens with its padding."""
        chunk = 2048
        batches: list[list[list[int]]] = []
        for start in range(0, len(texts), chunk):
            group: list[list[int]] = []
            for text in sorted(texts[start : start + chunk], key=len):
                if group and len(text) * (len(group) + 1) > self._settings.tokens:
                    batches.append(group)
                    group = []
                group.append(text)
            batches.append(group)
        self._draws.shuffle(batches)
        return batches

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Batches of token ids, padded on the right."""
        while True:
            for group in self._batches(self._texts()):
                longest = max(len(text) for text in group)
                yield torch.tensor([text + [self._pad] * (longest - len(text)) for text in group])


def rate_at(step: int, settings: Settings) -> float:
    """The learning rate of a step: linear warm-up, then a half cosine down to nearly nothing."""
    if step < settings.warmup:
        return settings.rate * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
    return settings.rate * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * done)))


def train(model: Any, reader: Reader, settings: Settings, pad: int, log: bool = False) -> float:
    """Train in place on next-token prediction; returns the loss of the last step."""
    wide = [p for p in model.parameters() if p.dim() == 2]
    flat = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": wide, "weight_decay": settings.decay}, {"params": flat, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.98))
    model.train()
    batches, begun, last = iter(reader), time.time(), 0.0
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, settings)
        ids = next(batches)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=pad)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        last = float(loss.detach())
        if log and (step % 50 == 0 or step + 1 == settings.steps):
            print(f"step {step} loss {last:.4f} seconds {time.time() - begun:.0f}", flush=True)
    return last


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Store the model with float16 weights, and a config that makes readers take them as float32."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: weight.detach().to(torch.float16).contiguous()
        for name, weight in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(state, str(folder / "model.safetensors"), metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ends = {"bos_token_id": model.config.bos_token_id, "eos_token_id": model.config.eos_token_id}
    changes: dict[str, dict[str, Any]] = {
        "config.json": {"architectures": ["LlamaForCausalLM"], "dtype": "float32"},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
        "generation_config.json": {**ends, "pad_token_id": model.config.pad_token_id},
    }
    for name, change in changes.items():
        path = folder / name
        values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        text = json.dumps({**values, **change}, indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


def build(relations: Path, out: Path, settings: Settings, log: bool = False) -> dict[str, Any]:
    """Make data files and model in ``out`` and return what was measured on the stored model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    begun = time.time()
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        facts = choose_facts(read_facts(relations), settings.seed, settings.facts)
        groups = divide(facts, settings.seed)
        write_data(data_rows(groups, settings.seed), out / "data")
        held = set(groups["statements"])
        tokenizer = train_tokenizer(corpus(facts, held), settings.pieces)
        model = new_model(settings, tokenizer)
        reader = Reader(facts, held, tokenizer, settings)
        loss = train(model, reader, settings, tokenizer.pad_token_id, log)
        save_model(model, tokenizer, out / "model")
        minutes = (time.time() - begun) / 60
        stored = AutoModelForCausalLM.from_pretrained(out / "model")
        again = AutoTokenizer.from_pretrained(out / "model")
        known = exact_match(stored, again, [(fact.prompt, fact.answer) for fact in facts])
    finally:
        torch.set_num_threads(threads)
    weights = out / "model" / "model.safetensors"
    return {
        "facts": len(facts),
        "known": round(known, 4),
        "loss": round(loss, 4),
        "minutes": round(minutes, 1),
        "parameters": sum(p.numel() for p in stored.parameters()),
        "bytes": weights.stat().st_size,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "settings": asdict(settings),
    }


def main() -> None:
    """Read the arguments, build, and print the measures as JSON."""
    parser = argparse.ArgumentParser(description="Train the atlas model and write its data files.")
    parser.add_argument("--relations", type=Path, required=True, help="relations.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder to write model/ and data/ into")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    given = parser.parse_args()
    settings = Settings(seed=given.seed, steps=given.steps)
    print(json.dumps(build(given.relations, given.out, settings, log=True), indent=2))


if __name__ == "__main__":
    main()
