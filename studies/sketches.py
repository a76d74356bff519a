"""Sums that any order of rows makes alike, against the buffer that top directions are kept in: errors of F̂.

Run it: ``python studies/sketches.py DATA MODEL``. DATA has the whole files of which assets/data has slices, MODEL is
the folder of SmolLM2 that studies/models.py writes. It prints a table of errors ‖F - F̂‖ over that of the best F̂.

The sum is Y = F G, G (n, l) random signs: it adds up over processes exactly. Of all F that it leaves possible the
smallest is Y (GᵀY)⁺ Yᵀ (Nyström), whose top k directions are compared, with the diagonal of all others as always.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from cells import read_rows
from torch import Tensor
from transformers import AutoTokenizer

from keeptune.data.calibration import Calibration
from keeptune.linalg.streaming_eigen import TopDirections
from keeptune.model.pretrained import LoadOptions, load_model
from keeptune.model.runner import Runner, Taps
from keeptune.model.summed_loss import Loss

RANKS = {"inputs of down_proj": 288, "gradients of gate_proj": 64}
LAYERS, TEXTS, TOKENS, TIMES = (0, 10, 20, 29), 64, 256, (2, 3, 4, 6)


def rows_of(model: str, data: Path) -> dict[tuple[str, int], Tensor]:
    """Pass texts forth and back, and keep all rows."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [row["text"] for row in read_rows(data / "c4_text/c4.jsonl")[:TEXTS]]
    ids = [tuple(tokenizer(text, truncation=True, max_length=TOKENS).input_ids) for text in texts]
    kept: dict[tuple[str, int], list[Tensor]] = {(kind, layer): [] for kind in RANKS for layer in LAYERS}
    taps, (inputs, gradients) = Taps(), RANKS
    for layer in LAYERS:
        taps.forward[f"model.layers.{layer}.mlp.down_proj"] = [kept[inputs, layer].append]
        taps.backward[f"model.layers.{layer}.mlp.gate_proj"] = [kept[gradients, layer].append]
    batches = Calibration(tuple(ids), tokenizer.pad_token_id).batches(1024)
    Runner(load_model(model, LoadOptions(device="cpu"))).backward(batches, taps, Loss("probe"), title="rows")
    return {site: torch.cat(parts).float() for site, parts in kept.items()}


def top(F: Tensor, k: int) -> Tensor:
    """Return the top k eigenvectors as they are."""
    values, U = torch.linalg.eigh(F)
    return (U[:, -k:] * values[-k:]) @ U[:, -k:].T


def nystroem(F: Tensor, size: int, k: int) -> Tensor:
    """Return the top k directions of what ``F G`` says."""
    G = (torch.randint(0, 2, (len(F), size), generator=torch.Generator().manual_seed(0)) * 2 - 1).double()
    Y = F @ G
    values, V = torch.linalg.eigh((G.T @ Y + Y.T @ G) / 2)
    held = values > 1e-12 * values[-1]
    U, S, _ = torch.linalg.svd((Y @ V[:, held]) / values[held].sqrt(), full_matrices=False)
    return (U[:, :k] * S[:k].square()) @ U[:, :k].T


def main(data: Path, model: str) -> None:
    """Print the table."""
    print("| rows, layer | k | buffer | " + " | ".join(f"l = {times}k" for times in TIMES) + " |")
    print("| --- | ---: | ---: |" + " ---: |" * len(TIMES))
    for (kind, layer), X in rows_of(model, data).items():
        F = X.double().T @ X.double() / len(X)

        def error(part: Tensor, F: Tensor = F) -> float:
            return float((part - F - torch.diag((part - F).diagonal())).norm())

        for k in (RANKS[kind], round(RANKS[kind] * X.shape[1] / 14336)):
            directions = TopDirections(X.shape[1], k, torch.device("cpu"))
            directions.add(X)
            found = directions.truncated().factor
            parts = [(found.U * found.values) @ found.U.T]
            parts += [nystroem(F, times * k, k) for times in TIMES if times * k <= len(F)]
            cells = [f"{error(part) / error(top(F, k)):.2f}" for part in parts]
            cells += [""] * (len(TIMES) + 1 - len(cells))
            print(f"| {kind}, {layer} | {k} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python studies/sketches.py DATA MODEL")
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])
