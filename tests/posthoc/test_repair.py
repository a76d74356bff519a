"""keeptune repair, from any adapter or tuned model to a plain LoRA, against the reference on rows of real tokens."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tests.models import (
    MODELS,
    VOCAB,
    RepaddingRunner,
    Saved,
    inputs_of,
    logits,
    mask_forgotten,
    names_in,
    off_by,
    padded_left,
    relative,
    save,
    tokens,
)
from tests.pipeline.support import keeptune, read_jsonl, write_jsonl
from tests.reference.repair_reference import repaired_by_least_squares
from tests.studies.adapters import LORA_KINDS, drawn_adapter, merged_changes
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from keeptune.adapter.special_layers import biases_are_no_shards
from keeptune.core.artefact import read_json
from keeptune.core.errors import DataError, ExportError, ModelError, RecipeError
from keeptune.core.weights import read_weight
from keeptune.data.calibration import Calibration
from keeptune.model.blocks import find_targets
from keeptune.model.pretrained import load_model
from keeptune.pipeline.trained_changes import TrainedModel
from keeptune.posthoc import repair as repair_module
from keeptune.posthoc import repair_problem
from keeptune.posthoc.repair import Repair, repair
from keeptune.posthoc.repair_problem import FactoredModel

DAMP = Repair().damping
ROLES = ["q_proj", "k_proj", "v_proj", "down_proj"]


def sentences(count: int, seed: int) -> list[str]:
    """Texts of different lengths for the tokenizer below."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 30, (count,), generator=generator).tolist()
    return [" ".join(f"w{i}" for i in torch.randint(3, VOCAB, (n,), generator=generator).tolist()) for n in lengths]


KNOWLEDGE, TASK = sentences(12, 1), [(text, " w7 w9") for text in sentences(9, 2)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    made: dict[str, Saved] = {}

    def base(architecture: str) -> Saved:
        if architecture not in made:
            kind, _, biased = architecture.partition(" ")
            saved = save(
                MODELS[kind](**({"attention_bias": True} if biased else {})),
                tmp_path_factory.mktemp("base") / architecture,
            )
            vocabulary = {"<pad>": 0, "<unk>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
            words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
            words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
            made_of = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
            made_of.save_pretrained(saved.folder)
            made[architecture] = saved
        return made[architecture]

    return base


@pytest.fixture
def base(bases: Callable[[str], Saved]) -> Saved:
    return bases("llama")


def adapter_of(base: Saved, folder: Path, roles: list[str] | None = None, **options: Any) -> Path:
    config = LoraConfig(target_modules=roles or ROLES, task_type="CAUSAL_LM", **({"r": 3} | options))
    return drawn_adapter(base, folder, config)


@pytest.fixture
def adapter(base: Saved, tmp_path: Path) -> Path:
    return adapter_of(base, tmp_path / "adapter")


@pytest.fixture
def repaired(base: Saved, adapter: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def run(source: Path | str = adapter, output: str = "repaired", **options: Any) -> dict[str, Any]:
        given = {"knowledge": KNOWLEDGE, "task": TASK, "base": str(base.folder)}
        given |= {name: options.pop(name) for name in ("knowledge", "task", "base", "benchmarks") if name in options}
        wanted = Repair(**({"store": tmp_path / "store", "device": "cpu"} | options))
        return repair(source, tmp_path / output, wanted, **given)

    return run


Repairing = Callable[..., dict[str, Any]]


def rows_of(base: Saved, texts: list[str], names: list[str], *, end: bool = False) -> dict[str, Tensor]:
    """Inputs of the base's modules at every token of the texts, one text at a time: no padding anywhere."""
    ids = [tuple(int(word[1:]) for word in text.split()) + ((2,) if end else ()) for text in texts]
    alone = [inputs_of(base.load(), names, Calibration((row,), pad_id=0)) for row in ids]
    return {name: torch.cat([inputs[name] for inputs in alone]) for name in names}


@pytest.mark.parametrize(
    ("architecture", "end"), [("llama", True), ("llama", False), ("llama with biases", True), ("gpt2", True)]
)
def test_the_repaired_adapter_is_the_least_squares_solution_on_rows_of_real_tokens(  # noqa: PLR0913
    architecture: str,
    end: bool,
    bases: Callable[[str], Saved],
    repaired: Repairing,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    base = bases(architecture)
    caplog.set_level(logging.INFO, logger="keeptune")
    roles = ["c_attn", "mlp.c_proj"] if architecture == "gpt2" else ROLES
    adapter = adapter_of(base, tmp_path / "own", roles=roles, fan_in_fan_out=architecture == "gpt2")
    record = repaired(adapter, base=str(base.folder), mu=0.3, end_token=end)
    assert record["end_token"] == ("each completion of the task ends with" in caplog.text) == end
    before, after = merged_changes(base, adapter), merged_changes(base, tmp_path / "repaired")
    names = [name for name, change in before.items() if change.norm() > 0]
    assert {row["target"] for row in record["targets"]} == set(names)
    known = rows_of(base, KNOWLEDGE, names)
    task = rows_of(base, [read + said for read, said in TASK], names, end=end)
    for row in record["targets"]:
        name = row["target"]
        wanted = repaired_by_least_squares(before[name], task[name], known[name], 0.3, DAMP)
        assert relative(after[name], wanted) < 1e-4
        W = read_weight(base.load(), next(t for t in find_targets(base.load()) if t.name == name)).double()
        put_out = float((known[name].double() @ W.T).square().sum())
        for key, change in (("drift_before", before[name]), ("drift", after[name])):
            moved = float((known[name].double() @ change.T).square().sum())
            assert row[key] == pytest.approx(moved / put_out, rel=1e-3)
        kept = [float((task[name].double() @ x.T).square().sum()) for x in (after[name], after[name] - before[name])]
        whole = float((task[name].double() @ before[name].T).square().sum())
        assert row["task_kept"] == pytest.approx(kept[0] / whole, rel=1e-3)
        assert row["task_error"] == pytest.approx(kept[1] / whole, rel=1e-3)
    assert all(float(after[name].norm()) == 0 for name in before.keys() - set(names))


@pytest.mark.parametrize("kind", LORA_KINDS)
def test_mu_zero_gives_stock_adapters_back(kind: str, base: Saved, repaired: Repairing, tmp_path: Path) -> None:
    adapter = adapter_of(base, tmp_path / kind, **LORA_KINDS[kind])
    repaired(adapter, mu=0.0)
    ids = tokens()
    wanted = logits(PeftModel.from_pretrained(base.load(), str(adapter)), ids)
    repaired_logits = logits(PeftModel.from_pretrained(base.load(), str(tmp_path / "repaired")), ids)
    assert off_by(repaired_logits, wanted) < 1e-5
    assert off_by(logits(base.load(), ids), wanted) > 1e-2


def test_mu_zero_gives_a_portable_adapter_back_bit_for_bit(base: Saved, repaired: Repairing, tmp_path: Path) -> None:
    adapter = adapter_of(base, tmp_path / "plain", r=8, lora_alpha=8)
    repaired(adapter, mu=0.0)
    before, after = (load_file(f / "adapter_model.safetensors") for f in (adapter, tmp_path / "repaired"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_lora_keeps_its_rank_and_its_b(base: Saved, repaired: Repairing, tmp_path: Path) -> None:
    adapter = adapter_of(base, tmp_path / "plain", r=8, lora_alpha=8)
    repaired(adapter, mu=0.5, rank=2)  # a rank for changes that have none of their own
    before, after = (load_file(f / "adapter_model.safetensors") for f in (adapter, tmp_path / "repaired"))
    assert all(torch.equal(before[key], after[key]) for key in before if "lora_B" in key)
    assert not any(torch.equal(before[key], after[key]) for key in before if "lora_A" in key)
    config = read_json(tmp_path / "repaired" / "adapter_config.json")
    assert (config["r"], config["lora_alpha"], config["use_dora"]) == (8, 8, False)


@pytest.mark.parametrize("share", [0.5, 0.05])
def test_a_budget_is_met_and_never_passed(share: float, repaired: Repairing, tmp_path: Path) -> None:
    budget = share * repaired(mu=0.0, output="same")["drift"]
    record = repaired(drift=budget)
    assert record["drift"] == pytest.approx(budget, rel=1e-4)
    assert record["drift"] <= budget * (1 + 1e-6)
    assert record["mu"] > 0
    assert record["drift"] == pytest.approx(sum(row["drift"] for row in record["targets"]) / len(record["targets"]))
    sidecar = read_json(tmp_path / "repaired" / "keeptune.json")
    assert sidecar["method"] == "repair"
    assert sidecar["provenance"]["repair"]["mu"] == record["mu"] == sidecar["options"]["mu"]
    assert sidecar["provenance"]["repair"]["targets"] == record["targets"]
    assert set(sidecar["provenance"]["data"]) == {"knowledge", "task"}


def test_a_drift_within_the_budget_changes_nothing_and_says_so(
    repaired: Repairing, base: Saved, adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="keeptune"):
        record = repaired(drift=1e3)
    assert record["mu"] == 0
    assert "nothing changes" in caplog.text
    after = merged_changes(base, tmp_path / "repaired")
    assert all(relative(after[name], change) < 1e-6 for name, change in merged_changes(base, adapter).items())


def test_without_task_data_the_knowledge_alone_decides(
    repaired: Repairing, base: Saved, adapter: Path, tmp_path: Path
) -> None:
    record = repaired(task=None, mu=0.4)
    assert record["task_kept"] is None
    before, after = merged_changes(base, adapter), merged_changes(base, tmp_path / "repaired")
    names = [row["target"] for row in record["targets"]]
    known = rows_of(base, KNOWLEDGE, names)
    for name in names:
        omega = known[name].double().T @ known[name].double() / len(known[name])
        n = len(omega)
        eye = torch.eye(n, dtype=torch.float64)
        tau = (1 + DAMP) * omega.trace() / n
        assert relative(after[name], before[name] @ torch.linalg.inv(eye + 0.4 * omega / tau)) < 1e-4


def test_dora_and_whole_models_become_plain_lora(
    repaired: Repairing, base: Saved, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dora = adapter_of(base, tmp_path / "dora", use_dora=True)
    merged = PeftModel.from_pretrained(base.load(), str(dora)).merge_and_unload()
    merged.save_pretrained(tmp_path / "whole")
    with caplog.at_level(logging.WARNING, logger="keeptune"):
        first = repaired(dora, "from dora", mu=0.3, rank=6)
        second = repaired(str(tmp_path / "whole"), "from whole", mu=0.3, rank=6)
    assert "rank 6 cuts off" in caplog.text
    ours, theirs = (merged_changes(base, tmp_path / name) for name in ("from dora", "from whole"))
    names = [row["target"] for row in first["targets"]]
    assert names == [row["target"] for row in second["targets"]]
    for name in names:
        assert relative(ours[name], theirs[name]) < 1e-2
        assert int(torch.linalg.matrix_rank(ours[name], rtol=1e-4)) == 6
    assert not read_json(tmp_path / "from dora" / "adapter_config.json")["use_dora"]
    before = merged_changes(base, dora)
    for row in first["targets"]:
        values = torch.linalg.svdvals(before[row["target"]]).square()
        assert row["truncation"] == pytest.approx(math.sqrt(values[6:].sum() / values.sum()), rel=1e-3)


def test_a_whole_model_at_full_rank_is_repaired_as_the_adapter_it_was_merged_from(
    repaired: Repairing, base: Saved, adapter: Path, tmp_path: Path
) -> None:
    PeftModel.from_pretrained(base.load(), str(adapter)).merge_and_unload().save_pretrained(tmp_path / "whole")
    repaired(mu=0.3, output="one")
    record = repaired(str(tmp_path / "whole"), "two", mu=0.3, rank=5)
    one, two = (merged_changes(base, tmp_path / name) for name in ("one", "two"))
    assert all(relative(two[row["target"]], one[row["target"]]) < 1e-3 for row in record["targets"])
    assert max(row["truncation"] for row in record["targets"]) < 1e-4


def test_what_else_was_trained_is_named(repaired: Repairing, bases: Callable[[str], Saved], tmp_path: Path) -> None:
    base = bases("llama with biases")
    biased = adapter_of(base, tmp_path / "biased", bias="lora_only", modules_to_save=["norm"])
    record = repaired(biased, base=str(base.folder), mu=0.1)
    assert "model.norm" in record["dropped"]
    assert "model.layers.0.self_attn.q_proj.bias" in record["dropped"]
    with biases_are_no_shards():
        of_rows = adapter_of(base, tmp_path / "rows", roles=["q_proj"], lora_bias=True)
    record = repaired(of_rows, "rows repaired", base=str(base.folder), mu=0.1)
    assert record["dropped"] == [f"model.layers.{i}.self_attn.q_proj.lora_B.bias" for i in range(2)]
    model = base.load()
    with torch.no_grad():
        model.get_submodule("model.layers.1.self_attn.o_proj").weight.add_(0.1)
        model.get_submodule("model.norm").weight.add_(0.1)
    model.save_pretrained(tmp_path / "whole")
    record = repaired(str(tmp_path / "whole"), "two", base=str(base.folder), mu=0.1)
    assert record["dropped"] == ["model.norm.weight"]
    assert [row["target"] for row in record["targets"]] == ["model.layers.1.self_attn.o_proj"]


def test_a_second_round_takes_the_inputs_of_the_repaired_model(
    repaired: Repairing, base: Saved, adapter: Path, tmp_path: Path
) -> None:
    repaired(mu=0.5, output="one")
    record = repaired(mu=0.5, output="two", rounds=2)
    running = Saved(tmp_path / "merged")
    PeftModel.from_pretrained(base.load(), str(tmp_path / "one")).merge_and_unload().save_pretrained(running.folder)
    names = [row["target"] for row in record["targets"]]
    known = rows_of(running, KNOWLEDGE, names)
    task = rows_of(running, [read + said for read, said in TASK], names, end=True)
    before, after = merged_changes(base, adapter), merged_changes(base, tmp_path / "two")
    for name in names:
        wanted = repaired_by_least_squares(before[name], task[name], known[name], 0.5, DAMP)
        assert relative(after[name], wanted) < 1e-3
    deep = [name for name in names if ".1." in name]  # the first layer's inputs are the same in both
    assert (
        max(
            relative(after[name], change)
            for name, change in merged_changes(base, tmp_path / "one").items()
            if name in deep
        )
        > 1e-2
    )


@pytest.mark.parametrize(("change", "moves"), [(padded_left, False), (mask_forgotten, True)])
def test_padding_never_enters(
    change: Any, moves: bool, repaired: Repairing, base: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repaired(mu=0.5, output="right")
    monkeypatch.setattr(repair_problem, "Runner", lambda model: RepaddingRunner(model, change))
    repaired(mu=0.5, output="changed", store=tmp_path / "other")
    right, changed = (merged_changes(base, tmp_path / name) for name in ("right", "changed"))
    gap = max(relative(changed[name], value) for name, value in right.items() if value.norm() > 0)
    assert gap > 1e-2 if moves else gap < 1e-4


def test_the_base_is_untouched_and_the_result_is_stock(repaired: Repairing, base: Saved, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in base.folder.iterdir()}
    repaired(mu=0.5)
    assert {path.name: path.read_bytes() for path in base.folder.iterdir()} == before
    wrapped = PeftModel.from_pretrained(base.load(), str(tmp_path / "repaired"))
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped, tokens()), logits(base.load(), tokens()))


def test_started_again_it_takes_its_statistics_from_the_store(
    repaired: Repairing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        (tmp_path / ".repaired.0123abcd").mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(repair_module, "export", killed)
        with pytest.raises(KeyboardInterrupt):
            repaired(mu=0.5)
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO, logger="keeptune"):
        patch.setattr(repair_problem.Runner, "run", killed)
        repaired(mu=0.5)
    assert "taken from" in caplog.text
    assert ".repaired.0123abcd" not in names_in(tmp_path)
    assert (tmp_path / "repaired" / "repair.json").is_file()


def test_repaired_twice_is_the_same(repaired: Repairing, tmp_path: Path) -> None:
    repaired(mu=0.5)
    first = (tmp_path / "repaired" / "adapter_model.safetensors").read_bytes()
    repaired(mu=0.5, store=tmp_path / "other")
    assert (tmp_path / "repaired" / "adapter_model.safetensors").read_bytes() == first


def test_without_knowledge_the_base_writes_its_own(repaired: Repairing) -> None:
    record = repaired(knowledge=None)
    assert 200 < record["examples"]["knowledge"] <= 256
    assert record["drift"] < record["drift_before"]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"drift": 0.1, "mu": 0.1}, RecipeError, "both"),
        ({"drift": 0.0}, RecipeError, "drift"),
        ({"drift": math.nan}, RecipeError, "drift"),
        ({"mu": -1.0}, RecipeError, "mu"),
        ({"mu": math.inf}, RecipeError, "mu"),
        ({"rank": 0}, RecipeError, "rank"),
        ({"rounds": 0}, RecipeError, "rounds"),
        ({"damping": 0.0}, RecipeError, "damping"),
        ({"sweep": [0.1, -1.0]}, RecipeError, "sweep"),
        ({"device": "cuda:99"}, RecipeError, "device"),
        ({"knowledge": []}, DataError, "no texts"),
        ({"knowledge": ["w3", " "]}, DataError, "not empty"),
        ({"task": []}, DataError, "task"),
        ({"source": "nowhere"}, ModelError, "nowhere"),
        ({"base": "/nowhere"}, ModelError, "nowhere"),
    ],
)
def test_wrong_input_is_refused_and_nothing_written(
    options: dict[str, Any], error: type[Exception], words: str, repaired: Repairing, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        repaired(**options)
    assert not (tmp_path / "repaired").exists()


def test_what_keeptune_did_not_write_is_never_replaced(repaired: Repairing, tmp_path: Path) -> None:
    (tmp_path / "repaired").mkdir()
    (tmp_path / "repaired" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ExportError, match="did not write"):
        repaired(mu=0.5)
    assert names_in(tmp_path / "repaired") == ["notes.txt"]


def test_an_untrained_or_damaged_adapter_is_refused(repaired: Repairing, base: Saved, tmp_path: Path) -> None:
    get_peft_model(base.load(), LoraConfig(target_modules=ROLES)).save_pretrained(tmp_path / "untrained")
    with pytest.raises(ModelError, match="changed no linear map"):
        repaired(tmp_path / "untrained")
    broken = adapter_of(base, tmp_path / "broken")
    tensors = load_file(broken / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = math.nan
    from safetensors.torch import save_file

    save_file(tensors, broken / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="NaN"):
        repaired(broken)


def test_the_sources_changes_are_those_of_stock_peft(base: Saved, adapter: Path) -> None:
    source = FactoredModel.of(TrainedModel.of(str(adapter), base=str(base.folder)))
    wanted = merged_changes(base, adapter)
    assert source.exact == source.changes.keys()
    assert all(relative(change.dense(), wanted[name]) < 1e-5 for name, change in source.changes.items())


# The command line, on a finished run of the job.


def test_a_run_folder_is_repaired_with_its_own_data_and_scored(
    finished: Callable[[str], Path], store: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished("lora")
    words: list[object] = ["repair", run, "--output", tmp_path / "out", "--store", store, "--mu", "0.3"]
    said = keeptune(*words, "--evaluate", run / "recipe.json", "--sweep", "0.1,1", capsys=capsys)
    assert said.code == 0, said.err
    record = read_json(tmp_path / "out" / "repair.json")
    assert record["examples"] == {"knowledge": 8, "task": 20}
    assert f"{record['drift']:.4g}" in said.out
    assert (tmp_path / "out" / "repair.png").is_file()
    assert [entry["mu"] for entry in record["sweep"]] == [0.1, 1.0]
    by_name = {row["name"]: row for row in record["scores"]}
    assert set(by_name) == {"stories", "sums", "animals"}
    evaluated = read_json(run / "evaluation" / "stories.json")["summary"]
    stories = by_name["stories"]
    assert stories["base"] == pytest.approx(evaluated["before"], rel=1e-6)
    assert stories["models"][0]["score"] == pytest.approx(evaluated["after"], rel=1e-6)
    scores = {entry["label"]: entry["score"] for entry in stories["models"]}
    assert list(scores) == ["adapter", "repaired", "mu 0.1", "mu 1"]
    assert len(set(scores.values())) == 4
    low, high = stories["models"][1]["interval_to_first"]
    assert low <= scores["repaired"] - scores["adapter"] <= high
    before = read_jsonl(run / "evaluation" / "stories.items.jsonl", 10)
    assert len(before) == stories["n"]
    again = keeptune(*words[:-2], "--mu", "1", capsys=capsys)
    assert again.code == 0, again.err
    merged = load_model(str(read_json(run / "recipe.json")["model"]))
    assert PeftModel.from_pretrained(merged, str(tmp_path / "out")) is not None


def test_other_files_and_templates(
    finished: Callable[[str], Path], store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = finished("lora") / "adapter"
    file = write_jsonl(tmp_path / "own.jsonl", [{"a": "Once there was", "b": "a dog"}, {"a": "The cat", "b": "ran"}])
    words: list[object] = ["repair", adapter, "--output", tmp_path / "out", "--store", store]
    said = keeptune(
        *words,
        "--knowledge",
        file,
        "--text",
        r"{a}\n{b}",
        "--task",
        "none",
        "--mu",
        "1",
        "--no-end-token",
        capsys=capsys,
    )
    assert said.code == 0, said.err
    record = read_json(tmp_path / "out" / "repair.json")
    assert record["examples"] == {"knowledge": 2}
    assert record["task_kept"] is None
    assert record["end_token"] is False


def test_errors_of_the_command_line(
    finished: Callable[[str], Path], store: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = finished("lora") / "adapter"
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    file = write_jsonl(tmp_path / "own.jsonl", [{"a": "Once there was"}])
    alone = Path(tmp_path / "alone")
    alone.symlink_to(adapter)  # no run folder around it
    fixed = ["--output", tmp_path / "out", "--store", store]
    cases: dict[str, list[object]] = {
        "both drift": [adapter, "--drift", "0.1", "--mu", "1"],
        "no such file": [adapter, "--knowledge", tmp_path / "none.jsonl"],
        "no rows": [adapter, "--knowledge", tmp_path / "empty.jsonl"],
        "no such folder": [tmp_path / "nowhere", "--knowledge", data / "knowledge.jsonl"],
        "no template": [alone, "--knowledge", file],
        "weights are not the ones it was made for": [adapter, "--base", "atlas"],
        "wanted numbers": [adapter, "--sweep", "a,b"],
        "items that are in": [
            *(adapter, "--knowledge", data / "stories.jsonl", "--evaluate", adapter.parent / "recipe.json"),
        ],
    }
    for words, options in cases.items():
        said = keeptune("repair", *options, *fixed, capsys=capsys)
        assert said.code == 2, (words, said)
        assert words in said.err, said.err
    assert not (tmp_path / "out").exists()
