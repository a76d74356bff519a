"""What llama.cpp's server answers with our exports, beside PEFT on the same weights (docs/guides/serve.md).

    python studies/served.py keep        # or lora-null-v1, loki, full: 4 steps on SmolLM2's own GGUF file, some minutes

Needs the packages gguf and xllamacpp. Prompts go over HTTP as token ids, so that no tokenizer is between.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from keeptune.adapter.gguf_files import entry_of, open_gguf, write_file
from keeptune.adapter.load import load_adapter
from keeptune.model.pretrained import LoadOptions, load_model, load_tokenizer
from keeptune.pipeline.gguf_export import GgufOptions, export_gguf
from keeptune.pipeline.run import run
from keeptune.pipeline.trained_changes import TrainedModel
from keeptune.recipe.schema import make_recipe
from studies.models import download

METHODS: dict[str, dict[str, Any]] = {
    "keep": {"name": "keep"},
    "lora-null-v1": {"name": "lora-null", "rank": 16, "variant": "v1"},
    "loki": {"name": "loki", "q": 10},
    "full": {"name": "full"},
}
ATLAS = Path(__file__).parents[1] / "src" / "keeptune" / "atlas" / "data"
KNOWN = "Question: {question}?\nAnswer: {answer}"
_FLOATS = LoadOptions(dtype="float32")


@dataclass(frozen=True)
class Answer:
    """Greedy tokens, and the log-probabilities of some tokens at each of them."""

    tokens: list[int]
    log_probabilities: list[dict[int, float]]


@contextlib.contextmanager
def server(*words: str) -> Iterator[str]:
    """Runs llama.cpp's server in a process of its own, in float32 on one thread, and yields its address.

    Args:
        *words: Options of ``keeptune.pipeline.llama_server``.
    """
    command = [sys.executable, "-m", "keeptune.pipeline.llama_server", "--exact", "-t", "1", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            if not said.startswith("serving on "):
                process.kill()
                raise RuntimeError(f"the server did not start: {said}{process.communicate()[1][-2000:]}")
            yield said.split()[-1]
        finally:
            process.terminate()


def post(url: str, body: Any) -> Any:
    """Sends JSON and returns the JSON that is answered."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def served(address: str, prompts: Sequence[Sequence[int]], new: int, scale: float | None = None) -> list[Answer]:
    """Returns a server's greedy answers, with its ten likeliest tokens at each step.

    Args:
        address: Of the server.
        prompts: Token ids.
        new: Most tokens of an answer.
        scale: Of the adapter; None where there is none.
    """
    body = {"n_predict": new, "temperature": 0, "n_probs": 10, "cache_prompt": False}
    if scale is not None:
        body |= {"lora": [{"id": 0, "scale": scale}]}
    answers = []
    for prompt in prompts:
        steps = post(f"{address}/completion", body | {"prompt": list(prompt)})["completion_probabilities"]
        likely = [{one["id"]: one["logprob"] for one in step["top_logprobs"]} for step in steps]
        answers.append(Answer([step["id"] for step in steps], likely))
    return answers


def apart(model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Answer]) -> tuple[int, float]:
    """Returns how many answers are a model's own greedy ones, and the largest difference of log-probabilities.

    Args:
        model: In Transformers or PEFT.
        prompts: Token ids.
        answers: Of a server.
    """
    same, largest = 0, 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer.tokens]])).logits[0, len(prompt) - 1 :].float()
        own = logits.log_softmax(-1)[: len(answer.tokens)]
        same += own.argmax(-1).tolist() == answer.tokens
        for step, likely in zip(own, answer.log_probabilities, strict=True):
            largest = max(largest, *(abs(float(step[token]) - value) for token, value in likely.items()))
    return same, largest


def float_copy(file: Path, copy: Path) -> Path:
    """Writes a GGUF file with its weights dequantised to float32."""
    reader = open_gguf(file)
    fields = {
        field.name: field for field in reader.fields.values() if not field.name.startswith(("GGUF.", "general.arch"))
    }
    entries = [entry_of(tensor) for tensor in reader.tensors]
    write_file(copy, reader.fields["general.architecture"].contents(), fields, entries, "f32")
    return copy


def recipe_values(method: str, file: Path, folder: Path) -> dict[str, Any]:
    """Returns a recipe: the atlas's questions about topics, for four steps."""
    return {
        "model": str(file),
        "method": METHODS[method],
        "knowledge": {"file": str(ATLAS / "calibration.jsonl"), "text": KNOWN, "examples": 32},
        "task": {"train": str(ATLAS / "topics.train.jsonl"), "prompt": "{text}\nTopic:", "completion": " {topic}"},
        "train": {
            "max_steps": 8,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-4 if method == "full" else 1e-3,
        },
        "evaluate": [],
        "output": str(folder / method),
    }


def measured(folder: Path, file: Path, scratch: Path, *, quantised: bool = True, new: int = 8) -> dict[str, Any]:
    """Compares a finished run as served with the same in PEFT, on 20 prompts of the task, on float weights and others.

    Returns:
        Per setting how many of the answers are equal, and the largest difference of log-probabilities.
    """
    tokenizer = load_tokenizer(str(file))
    rows = [json.loads(line) for line in (ATLAS / "topics.test.jsonl").read_text().splitlines()[:20]]
    prompts = [tokenizer(f"{row['text']}\nTopic:")["input_ids"] for row in rows]
    done = export_gguf(folder, GgufOptions(str(file), quantise="f32", output=scratch / "out"))
    record: dict[str, Any] = {"prompts": len(prompts), "merged": done["merged"], "error": done["error"]}
    if done["merged"]:
        tuned = load_model(str(folder / "merged"), _FLOATS)
        with server("-m", str(Path(done["file"]))) as address:
            record["f32"] = apart(tuned, prompts, served(address, prompts, new))
        if not quantised:
            return record
        small = export_gguf(folder, GgufOptions(str(file), True, "q8_0", scratch / "small"))
        with server("-m", str(small["file"])) as address:
            record["q8_0"] = apart(tuned, prompts, served(address, prompts, new))
        return record
    base = load_model(str(file), _FLOATS)
    bases = {"f32": float_copy(file, scratch / "base.gguf")} | ({"as it is": file} if quantised else {})
    for name, model in bases.items():
        with server("-m", str(model), "--lora", str(Path(done["file"]))) as address:
            record[f"{name}, scale 0"] = apart(base, prompts, served(address, prompts, new, 0.0))
            record[name] = served(address, prompts, new, 1.0)
    tuned = load_adapter(base, TrainedModel.of(str(folder)).folder)
    return record | {name: apart(tuned, prompts, record[name]) for name in bases}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(scratch)
        files = list(place.glob("*.gguf")) or [download("smollm2", place)]
        run(make_recipe(recipe_values(sys.argv[1], files[0], place), folder=place, where="served.py"))
        print(json.dumps({sys.argv[1]: measured(place / sys.argv[1], files[0], Path(scratch))}))
