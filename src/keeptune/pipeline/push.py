"""keeptune push: the adapter or model of a run to the hub, with a card that says what was kept and lost."""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token, try_to_load_from_cache

from keeptune.adapter.load import SIDECAR, read_sidecar
from keeptune.core.artefact import as_written, write_text
from keeptune.core.errors import ExportError, RecipeError
from keeptune.core.redaction import redacted
from keeptune.evaluation.results import trade_off
from keeptune.pipeline.reporting import FinishedRun, again
from keeptune.pipeline.trained_changes import TrainedModel
from keeptune.report.pages.card import model_card

_OWN_TEXTS = ("README.md", "adapter_config.json", SIDECAR)  # where paths of this machine become names on the hub


def push(
    source: Path | str, repo: str, *, base: str | None = None, private: bool = False, dry: bool = False
) -> dict[str, Any]:
    """Uploads what a run exported, and nothing else of it, to a repository on the hub, which is made where it is not.

    Args:
        source: A run folder, or an adapter or model that keeptune wrote.
        repo: ``"org/name"``.
        base: The base's name on the hub, ``"org/name"`` or ``"org/name@revision"``; None takes what the export names,
            at the revision in the hub's cache.
        private: Makes a private repository.
        dry: Uploads nothing.

    Returns:
        ``repo``, ``files`` (name to bytes), ``card``, and ``url`` of the commit (None when ``dry``).

    Raises:
        RecipeError: A name is none of the hub's, a file holds a token, or nobody is logged in.
        ModelError: The run has exported nothing.
        ArtefactError: The run's scores are not those of its export.
        ExportError: The hub cannot be reached, or refuses.
    """
    _need_name("keeptune push", repo)
    trained = TrainedModel.of(str(source), base=None)
    name, _, revision = (base or trained.base).partition("@")
    if Path(name).exists():
        raise RecipeError("--base", got=name, wanted="the base's name on the hub", next_step="Add --base org/name.")
    _need_name("--base", name)
    cached = try_to_load_from_cache(name, "config.json")
    revision = revision or (Path(cached).parent.name if isinstance(cached, str) else "")
    with tempfile.TemporaryDirectory(prefix="keeptune-") as scratch:
        staged = Path(scratch)
        for path in trained.folder.iterdir():
            if path.is_file() and path.name != "export.json":
                (staged / path.name).symlink_to(path.resolve())
        texts = {one: (staged / one).read_text(encoding="utf-8") for one in _OWN_TEXTS if (staged / one).is_file()}
        if SIDECAR in texts:
            texts[SIDECAR] = json.dumps(read_sidecar(trained.folder), indent=2, ensure_ascii=False) + "\n"
        if (Path(source) / "plan").is_dir():
            run = FinishedRun(Path(source))
            with as_written(source, again=again("run")):
                scores = run.entry | trade_off(run.results)
                texts["README.md"] = model_card(scores, read_sidecar(run.result), run.recipe)
        for one, text in texts.items():
            for here, there in ((str(trained.folder), repo), (trained.base, name)):
                text = text.replace(here, there) if "/" in here else text
            if one == "adapter_config.json":
                named = {"base_model_name_or_path": name, "revision": revision or None}
                text = json.dumps(json.loads(text) | named, indent=2) + "\n"
            elif one == "README.md" and revision:
                text = text.replace(f"`{name}`", f"`{name}` at `{revision}`", 1)
            (staged / one).unlink(missing_ok=True)
            write_text(staged / one, text)
        found = sorted(staged.iterdir())
        read = ((one.name, one.read_text("latin-1")) for one in found if one.suffix != ".safetensors")
        leaks = [name for name, text in read if redacted(text) != text]
        if leaks:
            raise RecipeError(leaks[0], got="a token or password in it", wanted="none", next_step="Take it out first.")
        card = (staged / "README.md").read_text(encoding="utf-8") if "README.md" in texts else ""
        done: dict[str, Any] = {"repo": repo, "files": {one.name: one.stat().st_size for one in found}, "card": card}
        if dry:
            return done | {"url": None}
        if get_token() is None:
            next_step = "Run `hf auth login`, or set HF_TOKEN; --dry-run shows what would be uploaded."
            raise RecipeError("keeptune push", got="nobody logged in", wanted="a token of the hub", next_step=next_step)
        try:
            api = HfApi()
            api.create_repo(repo, private=private or None, exist_ok=True)
            commit = api.upload_folder(repo_id=repo, folder_path=staged, commit_message="Upload by keeptune")
        # OSError: no network, offline mode, or the hub's refusal; ValueError: what the hub does not take.
        except (OSError, ValueError) as error:
            raise ExportError(
                f"push to {repo}",
                got=" ".join(str(error).split())[:300],
                wanted="a hub that takes it",
                next_step="Check the name, the token's rights (`hf auth whoami`), the network and HF_HUB_OFFLINE.",
            ) from error
        return done | {"url": str(commit.commit_url)}


def _need_name(where: str, name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name, re.ASCII) or ".." in name or "--" in name:
        raise RecipeError(where, got=f'"{name}"', wanted='a name on the hub, "org/name"', next_step="Change it.")
