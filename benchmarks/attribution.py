"""KVA, all blocks of a batch at once, against Captum's LayerIntegratedGradients, a block at a time."""

from __future__ import annotations

import statistics
import time

import processes
import torch
from captum.attr import LayerIntegratedGradients
from random_llama import random_llama
from tests.reference.attribution_reference import attribution
from torch import Tensor
from transformers import LlamaForCausalLM

from keeptune.data.calibration import Batch
from keeptune.model.probes.attribution import Attributor, Integral

WIDTH, LAYERS, VOCABULARY, TOKENS, TEXTS, STEPS = 256, 8, 8192, 256, 4, 7
ROUNDS = 1  # processor time hardly depends on what else the machine does
INTEGRALS = {
    "last": Integral(),
    "all": Integral(positions="all", baseline="pad", rule="trapezoid"),
}


def model_of(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return random_llama(WIDTH, layers, VOCABULARY, initializer_range=0.1).eval().requires_grad_(False)


def captum(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Attribute one text, a block at a time; all positions are scaled, from a run on token 0.

    Args:
        model: The model.
        ids: ``(1, W)``.

    Returns:
        ``(L, D)``.
    """
    with torch.no_grad():
        token = int(model(ids, logits_to_keep=1).logits[0, -1].argmax())

    def forward(given: Tensor) -> Tensor:
        return model(given, use_cache=False, logits_to_keep=1).logits[:, -1].softmax(dim=-1)[:, token]

    found = []
    for layer in model.model.layers:
        witness = LayerIntegratedGradients(forward, layer.mlp.down_proj)
        given = witness.attribute(ids, baselines=torch.zeros_like(ids), n_steps=STEPS, method="riemann_trapezoid")
        found.append(given[0, -1])
    return torch.stack(found) * STEPS / (STEPS - 1)


def attributed(way: str, layers: int = LAYERS, chunk: int = 2048) -> tuple[float, float, Tensor]:
    """Attribute texts of random tokens.

    Args:
        way: ``captum``, ``forward`` (one pass of each text without the head), ``last`` or ``all``.
        layers: Blocks.
        chunk: Tokens in a pass.

    Returns:
        Seconds of processor time per text; the peak of memory above what the model and one pass of a text take, in
        MiB; the first text's attributions.
    """
    model = model_of(layers)
    ids = torch.randint(3, VOCABULARY, (TEXTS, TOKENS))
    rows = max(1, chunk // TOKENS)
    batches = [Batch(some, torch.ones_like(some)) for some in torch.split(ids, rows)]
    with torch.no_grad():
        model(ids[:1])
    found = torch.empty(0)
    if way in INTEGRALS:
        # As in a long run: the check of the first batch is done once.
        attributor = Attributor(model, INTEGRALS[way], chunk=chunk)
        attributor.attribute(Batch(ids[:1, :8], torch.ones_like(ids[:1, :8])))
        before, start = processes.peak(), time.process_time()
        found = torch.cat([attributor.attribute(batch) for batch in batches])[0]
        return (time.process_time() - start) / TEXTS, processes.peak() - before, found
    before, start = processes.peak(), time.process_time()
    if way == "forward":
        with torch.no_grad():
            for batch in batches:
                model.model(batch.input_ids)
        return (time.process_time() - start) / TEXTS, processes.peak() - before, found
    found = captum(model, ids[:1])
    return time.process_time() - start, processes.peak() - before, found


def measured(way: str, layers: int = LAYERS, chunk: int = 2048) -> tuple[float, float]:
    """Measure one way in processes of its own.

    Args:
        way: As in :func:`attributed`.
        layers: Blocks.
        chunk: Tokens in a pass.

    Returns:
        Medians of seconds and MiB.
    """
    call = f"attribution.attributed({way!r}, {layers}, {chunk})"
    code = f"import torch, attribution; torch.set_num_threads(1); print(*{call}[:2])"
    found = [processes.numbers_of(code) for _ in range(ROUNDS)]
    return statistics.median(seconds for seconds, _ in found), statistics.median(peak for _, peak in found)


def _gap(found: Tensor, wanted: Tensor) -> str:
    return f"largest difference over the largest value: {float((found - wanted).abs().max() / wanted.abs().max()):.1e}"


def rows() -> list[dict[str, str]]:
    """Compare with Captum, then depths with each other."""
    witness = attributed("captum")[2]
    size = f"{LAYERS} layers of {WIDTH}, {TOKENS} tokens, {STEPS} steps"
    slow, most = measured("captum")
    made = []
    for way, chunk in (("last", 2048), ("last", 512), ("all", 2048), ("all", 512)):
        seconds, peak = measured(way, chunk=chunk)
        found = attributed(way, chunk=chunk)[2]
        plain = witness
        if way == "last":
            model = model_of(LAYERS)
            ids = torch.randint(3, VOCABULARY, (TEXTS, TOKENS))[:1]
            plain = attribution(model, ids[0].tolist())
        made.append(
            {
                "benchmark": f"attribution, {way}: {size}, chunk {chunk}, per text",
                "plain": f"Captum per layer {slow:.2f} s, {most:.0f} MiB",
                "keeptune": f"{seconds:.3f} s, {peak:.0f} MiB",
                "ratio": f"{slow / seconds:.1f} x",
                "check": _gap(found, plain),
            }
        )
    depths = {layers: (measured("forward", layers)[0], measured("last", layers)[0]) for layers in (4, 8, 16, 32)}
    for layers, (forward, seconds) in depths.items():
        rest, half = seconds - forward, depths[max(4, layers // 2)][1] - depths[max(4, layers // 2)][0]
        made.append(
            {
                "benchmark": f"the same, last, {layers} layers",
                "plain": f"one forward pass {forward:.3f} s",
                "keeptune": f"{seconds:.3f} s",
                "ratio": f"{seconds / forward:.2f} of a pass",
                "check": f"beyond the pass {rest:.3f} s: {rest / half:.1f} x that of half the layers",
            }
        )
    return made
