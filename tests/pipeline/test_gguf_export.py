"""Runs as GGUF files: answered from by llama.cpp as PEFT computes them, and what is wrong said."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.assets import STORIES
from tests.gguf_files import gguf_llama, write_base, write_gguf
from tests.pipeline.support import METHODS, keeptune, recipe_of, write_recipe
from transformers import PreTrainedTokenizerFast

from keeptune.adapter.gguf_files import field_of, open_gguf, values_of
from keeptune.adapter.load import load_adapter
from keeptune.model.pretrained import load_model, load_tokenizer
from keeptune.pipeline import gguf_export
from keeptune.pipeline.gguf_export import GgufOptions, export_gguf, go_template
from keeptune.pipeline.run import run

Values = Callable[..., dict[str, Any]]
FORMS: dict[str, dict[str, Any]] = {
    "keep": {"method": {"name": "keep"}},
    "rank 2 r": {"method": METHODS["lora-null-v1"]},
    "loki": {"method": {"name": "loki", "q": 10}, "export": {"format": "merged"}},
    "full": {"method": METHODS["full"]},
}
needs_server = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs the package xllamacpp")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(load_model(str(STORIES)), tmp_path_factory.mktemp("gguf") / "base.gguf", "llama")


def prompts(count: int = 20) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 500, (4 + index,), generator=generator).tolist() for index in range(count)]


@needs_server
@pytest.mark.parametrize("form", FORMS)
def test_a_served_run_answers_as_it_was_trained(form: str, base: Path, recipe_values: Values) -> None:
    from studies.served import apart, served, server

    given = recipe_values(**FORMS[form])
    given["train"] |= {"learning_rate": 1e-2, "max_steps": 5}
    run(recipe_of(given))
    folder = Path(given["output"])
    done = export_gguf(folder, GgufOptions(str(base), quantise="f32"))
    merged = form in {"loki", "full"}
    assert (done["merged"], bool(done["note"]), Path(done["file"]).parent.name) == (
        merged,
        merged,
        "gguf-merged" if merged else "gguf",
    )
    modelfile = (Path(done["file"]).parent / "Modelfile").read_text()
    started = load_model(str(STORIES))
    if merged:
        assert (done["error"] < 1e-4, modelfile) == (True, "FROM ./model.gguf\n")
        with server("-m", str(Path(done["file"]))) as address:
            answers = served(address, prompts(), 6)
        tuned, before = load_model(str(folder / "merged")), started
    else:
        assert (done["error"], modelfile) == (0, f"FROM {base}\nADAPTER ./adapter.gguf\n")
        ranks = {tuple(one.shape)[1] for one in open_gguf(Path(done["file"])).tensors if one.name.endswith("lora_a")}
        assert ranks == {8}  # of lora-null v1 2 r, of both one that servers take
        with server("-m", str(base), "--lora", str(Path(done["file"]))) as address:
            answers, off = (served(address, prompts(), 6, scale) for scale in (1.0, 0.0))
        same, largest = apart(started, prompts(), off)
        assert (same, largest < 1e-3) == (20, True)
        tuned, before = load_adapter(load_model(str(STORIES)), folder / "adapter"), started
    same, largest = apart(tuned, prompts(), answers)
    assert (same, largest < 1e-3) == (20, True)
    assert apart(before, prompts(), answers)[1] > 0.01


@needs_server
@pytest.mark.real
@pytest.mark.skipif("KEEPTUNE_MODELS" not in os.environ, reason="a minute: set KEEPTUNE_MODELS to a folder of models")
@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_smollm2_answers_on_its_own_file_as_in_peft(smollm2_file: Path, tmp_path: Path) -> None:
    from studies.served import measured

    model = load_model(str(smollm2_file))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(r=16, lora_alpha=1, init_lora_weights=False, target_modules="all-linear")
        config.base_model_name_or_path = model.name_or_path = str(smollm2_file)
        get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    del model
    found = measured(tmp_path / "adapter", smollm2_file, tmp_path, quantised=False, new=3)
    assert (found["prompts"], found["error"]) == (20, 0)
    for setting in ("f32", "f32, scale 0"):
        assert (found[setting][0], found[setting][1] < 1e-3) == (20, True)


@pytest.mark.parametrize(("quantise", "bound"), [("f16", 2e-2), ("q8_0", 0.3)])
def test_a_whole_model_is_written_in_fewer_bits_with_the_metadata_of_the_base(
    quantise: Any, bound: float, base: Path, finished: Callable[[str], Path], tmp_path: Path
) -> None:
    options = GgufOptions(str(base), merged=True, quantise=quantise, output=tmp_path / "out")
    done = export_gguf(finished("lora"), options)
    assert 0 < done["error"] < bound
    written, given = open_gguf(Path(done["file"])), open_gguf(base)
    assert field_of(written, "tokenizer.ggml.tokens") == field_of(given, "tokenizer.ggml.tokens")
    assert field_of(written, "general.file_type") == {"f16": 1, "q8_0": 7}[quantise]
    assert {one.name for one in written.tensors} == {one.name for one in given.tensors}
    types = {one.tensor_type.name for one in written.tensors}
    assert types - {"F16"} == {"F32", quantise.upper()} - {"F16"}  # rows that are no whole blocks of q8_0 are f16
    assert export_gguf(finished("lora"), replace(options, quantise="f32"))["error"] == 0
    assert json.loads((tmp_path / "out" / "keeptune.json").read_text())["gguf"]["quantise"] == "f32"


def test_the_change_in_a_file_is_the_trained_one(finished: Callable[[str], Path], tmp_path: Path) -> None:
    """Without the base's file too; a rounded one says by how much."""
    errors = {}
    for quantise in ("f32", "f16"):
        done = export_gguf(finished("lora"), GgufOptions(quantise=quantise, output=tmp_path / quantise))  # type: ignore[arg-type]
        errors[quantise] = done["error"]
        assert done["serve"] == f"llama-server -m base.gguf --lora {Path(done['file'])} --alias tuned"
    assert errors["f32"] == 0 < errors["f16"] < 1e-3
    tensors = {one.name: values_of(one) for one in open_gguf(tmp_path / "f32" / "adapter.gguf").tensors}
    tuned = load_adapter(load_model(str(STORIES)), finished("lora") / "adapter")
    for name, module in tuned.named_modules():
        if name.endswith("mlp.up_proj"):
            block = name.split(".")[-3]
            delta = tensors[f"blk.{block}.ffn_up.weight.lora_b"] @ tensors[f"blk.{block}.ffn_up.weight.lora_a"]
            torch.testing.assert_close(delta, module.get_delta_weight("default"), rtol=1e-5, atol=1e-7)


def test_export_from_the_command_line(
    base: Path, recipe_values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = recipe_values(method=METHODS["dora"])
    run(recipe_of(given))
    folder, recipe = Path(given["output"]), write_recipe(tmp_path / "recipe.yaml", given)
    said = keeptune("export", recipe, "--to", "gguf", "--base", base, "--json", capsys=capsys)
    assert (said.code, json.loads(said.out)["merged"]) == (0, True)  # a merged DoRA run: no LoRA, so the whole model
    assert (folder / "gguf-merged" / "model.gguf").is_file()
    other = write_gguf(gguf_llama(), tmp_path / "other.gguf") and tmp_path / "other.gguf"
    for words, says in (
        (["--merged"], "--merged: got no --to"),
        (["--to", "onnx"], '--to: got "onnx"'),
        (["--to", "gguf", "--base", base, "--quantise", "q4"], '--quantise: got "q4"'),
        (["--to", "gguf", "--base", tmp_path / "absent.gguf"], "no such file"),
        (["--to", "gguf"], "got no GGUF file of the base"),
        (["--to", "gguf", "--base", other], "tensors|no blk"),
    ):
        said = (
            keeptune("export", folder, *words, capsys=capsys)
            if "--to" in words
            else keeptune("export", recipe, *words, capsys=capsys)
        )
        assert said.code == 2, words
        assert re.search(says, said.err), said.err


def test_a_base_of_other_values_is_refused(finished: Callable[[str], Path], tmp_path: Path) -> None:
    other = load_model(str(STORIES))
    for value in other.state_dict().values():
        value.copy_(value.flip(0))
    file = write_base(other, tmp_path / "other.gguf", "llama")
    with pytest.raises(
        Exception, match=r"blk.\d.\w+.weight that differs from model.layers.*Pass the GGUF file of the base"
    ):
        export_gguf(finished("lora"), GgufOptions(str(file), output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "[{{ m.role[0] }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)


@pytest.mark.parametrize(("template", "system"), [(CHATML, True), (NO_SYSTEM, False)])
def test_ollama_s_template_writes_what_the_chat_template_does(
    template: str, system: bool, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer: PreTrainedTokenizerFast = load_tokenizer(str(base))
    tokenizer.chat_template = template
    bos = "" if system else "<s>"  # which the server writes itself
    monkeypatch.setattr(gguf_export, "field_of", lambda *_: not system)
    text = go_template(tokenizer, None)
    for go, jinja in (  # the few words of Go's language that are used, in Jinja's
        (r'{{ \$last := "" }}', "{% set ns = namespace(last='') %}"),
        (r"{{ range \.Messages }}", "{% for m in messages %}"),
        (r'{{ if eq \$last ("\w+") }}', r"{% if ns.last == \1 %}"),
        (r'{{ if eq \.Role ("\w+") }}', r"{% if m.role == \1 %}"),
        (r"{{ else }}", "{% else %}"),
        (r"{{ \.Content }}", "{{ m.content }}"),
        (r"{{ \$last = \.Role }}{{ end }}", "{% set ns.last = m.role %}{% endfor %}"),
        (r"{{ end }}", "{% endif %}"),
    ):
        text = re.sub(go, jinja, text)
    turns = [{"role": role, "content": f"{role} says"} for role in ("user", "assistant", "user", "assistant", "user")]
    opening = [{"role": "system", "content": "Obey."}]
    for talk in (turns[:1], turns[:3], turns, *([opening + turns[:1], opening + turns] if system else [])):
        wanted = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True).removeprefix(bos)
        found = jinja2.Environment(keep_trailing_newline=True).from_string(text).render(messages=talk)
        assert found == wanted


def test_the_template_trained_with_is_passed_on_where_the_base_has_another(
    base: Path, recipe_values: Values, tmp_path: Path
) -> None:
    given = recipe_values(method=METHODS["lora"])
    template = CHATML.replace("<|im_end|>", "<unk>")  # one token, which is not the end of the base's texts
    given["task"]["chat_template"] = str(tmp_path / "chat.jinja")
    (tmp_path / "chat.jinja").write_text(template)
    run(recipe_of(given))
    done = export_gguf(given["output"], GgufOptions(str(base)))
    assert f"--chat-template-file {Path(done['file']).parent / 'chat_template.jinja'}" in done["serve"]
    assert (Path(done["file"]).parent / "chat_template.jinja").read_text() == template
    assert {"TEMPLATE", 'PARAMETER stop "<unk>"'} <= set(re.findall(r"^(?:TEMPLATE|PARAM.*)", modelfile(done), re.M))
    whole = export_gguf(given["output"], GgufOptions(str(base), merged=True))
    written, unchanged = open_gguf(whole["file"]), open_gguf(base)
    assert field_of(written, "tokenizer.chat_template") == template
    assert field_of(written, "tokenizer.ggml.eot_token_id") == load_tokenizer(str(base)).convert_tokens_to_ids("<unk>")
    assert 'PARAMETER stop "<unk>"' in modelfile(whole)
    same = "tokenizer.ggml.eos_token_id"
    assert field_of(written, same) == field_of(unchanged, same)


def modelfile(done: dict[str, Any]) -> str:
    return (Path(done["file"]).parent / "Modelfile").read_text()
