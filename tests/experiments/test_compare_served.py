"""Two running servers scored on the same items: the numbers of the same models in memory, and servers that cannot."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.assets import DATA
from tests.pipeline.support import MODEL, keeptune, write_data
from transformers import AutoModelForCausalLM, AutoTokenizer

from keeptune import compare_served
from keeptune.core.errors import KeeptuneError
from keeptune.experiments.gate import check

pytest.importorskip("lm_eval")

SUITE = f"""
evaluate:
  - {{name: pets, role: task, file: choices.jsonl, prompt: "{{question}}", choices: "{{choices}}", answer: "{{label}}",
     metric: multiple_choice}}
  - {{name: facts, role: knowledge, file: facts.jsonl, prompt: "{{question}}", answer: "{{answer}}",
     metric: exact_match, max_new_tokens: 4}}
  - {{name: openbookqa, data: {DATA / "commonsense"}, examples: 6}}
  - {{name: gsm8k, data: {DATA / "gsm8k"}, examples: 2, shots: 0, max_length: 256, max_new_tokens: 8}}
"""


class Served(BaseHTTPRequestHandler):
    """Answers as vLLM does, with the true log-probabilities of tiny models by name."""

    models: Mapping[str, Any]
    tokenizer: Any
    gives_logprobs = True

    def do_GET(self) -> None:
        self.reply({"data": [{"id": name} for name in self.models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            self.reply({"tokens": self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]})
            return
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        answer = self.scored if body.get("echo") else self.generated
        choices = [{"index": index, **answer(body, prompt)} for index, prompt in enumerate(prompts)]
        self.reply({"choices": choices})

    def scored(self, body: Any, ids: list[int]) -> dict[str, Any]:
        with torch.no_grad():
            scores = self.models[body["model"]](torch.tensor([ids])).logits[0].log_softmax(-1)
        following = [*ids[1:], int(scores[-1].argmax())]
        own = [float(row[token]) for row, token in zip(scores, following, strict=True)]
        best = [
            {str(token): value, "best": float(row.max())}
            for row, token, value in zip(scores, following, own, strict=True)
        ]
        logprobs = {"token_logprobs": [None, *own], "top_logprobs": [None, *best]}
        return {"text": "", "logprobs": logprobs if self.gives_logprobs else None}

    def generated(self, body: Any, ids: list[int]) -> dict[str, Any]:
        start = torch.tensor([ids])
        how = {"max_new_tokens": body["max_tokens"], "do_sample": False, "pad_token_id": 0}
        found = self.models[body["model"]].generate(input_ids=start, attention_mask=torch.ones_like(start), **how)
        text = self.tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True)
        for stop in body.get("stop") or ():
            text = text.split(stop)[0]
        return {"text": text}

    def reply(self, value: Any) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a suite and an adapter of much effect."""
    root = write_data(tmp_path_factory.mktemp("served"))
    (root / "suite.yaml").write_text(SUITE, "utf-8")
    rows = [{"question": f"Once upon a time, there was a {name}", "answer": "who"} for name in ("girl", "dog", "cat")]
    (root / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), config).save_pretrained(str(root / "wild"))
    return root


@pytest.fixture
def serve(folder: Path) -> Iterator[Any]:
    """Start a server of the base and the adapter; ``more`` are attributes of its handler."""
    running = []

    def start(**more: Any) -> str:
        tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), folder / "wild")
        models = {"base": AutoModelForCausalLM.from_pretrained(MODEL), "tuned": tuned}
        own = {"models": models, "tokenizer": AutoTokenizer.from_pretrained(MODEL)}
        handler = type("Own", (Served,), own | more)
        running.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=running[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{running[-1].server_address[1]}"

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def test_what_is_lost_as_served_is_what_is_lost_in_memory(
    serve: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = serve()
    wanted = check(str(folder / "wild"), folder / "suite.yaml")
    arguments = [
        "compare-served",
        url + "/v1/",
        "--base-url",
        url,
        "--suite",
        folder / "suite.yaml",
        "--model",
        "tuned",
    ]
    arguments += ["--base-model", "base", "--tokenizer", MODEL]
    said = keeptune(*arguments, "--json", capsys=capsys)
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert (found["before"], found["after"]["model"]) == ({"url": url, "model": "base"}, "tuned")
    assert [row["name"] for row in found["benchmarks"]] == ["pets", "facts", "openbookqa", "gsm8k"]
    for row, own in zip(found["benchmarks"], wanted["benchmarks"], strict=True):
        keys = ("name", "role", "metric", "n", "before", "after", "interval", "loss", "loss_interval")
        assert {key: row[key] for key in keys} == {key: own[key] for key in keys}
    assert any(row["before"] != row["after"] for row in found["benchmarks"])
    assert "LOST" not in keeptune(*arguments, capsys=capsys).out


def cut_otherwise(text: str, **_: Any) -> dict[str, list[int]]:
    return {"input_ids": [ord(letter) for letter in text]}


@pytest.mark.parametrize(
    ("server", "named", "words"),
    [
        ({"gives_logprobs": False}, {}, "without the log-probabilities of its prompt"),
        ({"tokenizer": staticmethod(cut_otherwise)}, {}, "into other tokens"),
        ({}, {"model": "other"}, 'wanted "other"'),
        ({}, {"model": None}, "the models base, tuned"),
        ({}, {"model": "base"}, "base at .* twice"),
    ],
)
def test_servers_that_cannot_be_compared(
    server: dict[str, Any], named: dict[str, Any], words: str, serve: Any, folder: Path
) -> None:
    url = serve(**server)
    names = {"model": "tuned", "base_model": "base", "tokenizer": str(MODEL)} | named
    with pytest.raises(KeeptuneError, match=words):
        compare_served(url, url, folder / "suite.yaml", **names)


def test_a_server_that_does_not_answer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = "http://127.0.0.1:9"
    said = keeptune("compare-served", nowhere, "--base-url", nowhere, "--suite", folder / "suite.yaml", capsys=capsys)
    assert (said.code, "wanted an OpenAI-compatible server that runs" in said.err) == (2, True), said.err


def test_a_kind_that_servers_do_not_answer(serve: Any, folder: Path) -> None:
    entry = {
        "name": "stories",
        "role": "knowledge",
        "file": "stories.jsonl",
        "text": "{text}",
        "metric": "cross_entropy",
    }
    (folder / "texts.yaml").write_text(json.dumps({"evaluate": [entry]}), "utf-8")
    url = serve()
    with pytest.raises(KeeptuneError, match="keeptune check"):
        compare_served(url, url, folder / "texts.yaml", model="tuned", base_model="base", tokenizer=str(MODEL))
