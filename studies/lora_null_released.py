"""What LoRA-Null's released code loses against the paper's equations: leakage ‖A X‖ / ‖A‖‖X‖ on atlas.

Run it: `python studies/lora_null_released.py` (half a minute). The table is in docs/methods/lora-null.md.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path

from keeptune import atlas
from keeptune.core.weights import read_weight
from keeptune.data.calibration import tokenize_calibration
from keeptune.methods.base import make_plan
from keeptune.methods.lora_null import LoraNull
from keeptune.model.pretrained import load_model, load_tokenizer
from keeptune.pipeline.planning import statistics_for
from keeptune.statistics.covariance import InputCovariance
from keeptune.statistics.store import StatStore


def main() -> None:
    """Print the leakage of both, by role."""
    name = str(atlas.model_path())
    model, tokenizer = load_model(name), load_tokenizer(name)
    rows = map(json.loads, atlas.data_path("calibration.jsonl").read_text(encoding="utf-8").splitlines())
    texts = [f"{row['question']}\nAnswer: {row['answer']}" for row in rows][:256]
    tokens = tokenize_calibration(texts, tokenizer, max_length=1024, where="knowledge")
    leakage: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = StatStore(Path(folder))
        data = {"knowledge": tokens}
        targets, exact = statistics_for(model, LoraNull(), store, data=data)
        for label, method in (("exact", LoraNull(rank=8)), ("released", LoraNull(rank=8, covariance="released"))):
            _, statistics_ = statistics_for(model, method, store, data=data)
            plan = make_plan(method, targets, lambda target: read_weight(model, target), statistics_.view)
            for target in targets:
                omega = exact.view(target)[InputCovariance("knowledge")].double()
                A = plan[target.name].init.A.double()
                leak = ((A @ omega * A).sum() / A.pow(2).sum() / omega.trace()).clamp_min(0).sqrt()
                leakage.setdefault(target.role, {}).setdefault(label, []).append(float(leak))
    print("| role | exact | released | ratio |\n| --- | ---: | ---: | ---: |")
    for role, found in leakage.items():
        means = {label: statistics.mean(values) for label, values in found.items()}
        print(f"| {role} | {means['exact']:.2e} | {means['released']:.2e} | {means['released'] / means['exact']:.1f} |")


if __name__ == "__main__":
    main()
