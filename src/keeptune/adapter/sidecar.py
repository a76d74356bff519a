"""What an export says about itself: keeptune's record beside it, its README, and how to serve it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keeptune.adapter.vllm_rules import VllmVerdict
from keeptune.core.plan import Plan


@dataclass(frozen=True, slots=True)
class About:
    """What is exported, of what.

    Args:
        plan: The plan that was trained.
        base: Path or hub id of the base that it is for; of a merged model, of the weights it was merged into.
        labels: Of a classifier; None for a language model.
        quantization: Fields of the quantisation that the base was loaded with for training; None as it is stored.
        trained_on: Path or hub id of the quantised base that a merged model was trained on.
    """

    plan: Plan
    base: str
    labels: Sequence[str] | None
    quantization: Mapping[str, Any] | None
    trained_on: str | None = None

    def serve_line(self, folder: Path | str, verdict: VllmVerdict | None) -> str:
        """Returns the command that serves an export, or the call that loads a classifier.

        Args:
            folder: The export.
            verdict: What vLLM makes of the adapter; None for a whole model.
        """
        if self.labels is not None:  # vLLM serves no classifier with an adapter
            load = "AutoModelForSequenceClassification.from_pretrained"
            whole = f'{load}("{self.base}", num_labels={max(1, len(self.labels))})'
            return f'{load}("{folder}")' if verdict is None else f'PeftModel.from_pretrained({whole}, "{folder}")'
        if verdict is None:
            return shlex.join(["vllm", "serve", str(folder)])
        if verdict.refused:
            return f"{shlex.join(['keeptune', 'merge', str(folder), 'merged'])} && vllm serve merged"
        how = ["--quantization", "bitsandbytes"] if self.quantization else []
        options = ["--enable-lora", "--max-lora-rank", str(verdict.max_lora_rank), "--lora-modules", f"tuned={folder}"]
        return shlex.join(["vllm", "serve", self.base, *how, *options])

    def judged(self, verdict: VllmVerdict) -> VllmVerdict:
        """Returns what vLLM makes of an adapter on this base: it quantises one only to bitsandbytes' nf4."""
        bits, reason = self.quantization or {}, ""
        if bits and not (bits.get("load_in_4bit") and bits.get("bnb_4bit_quant_type") == "nf4"):
            reason = "a base that is quantised as it is loaded, otherwise than vLLM does (nf4)"
        elif self.base.endswith(".gguf"):
            reason = "a base in a GGUF file"
        return replace(verdict, refused=(*verdict.refused, reason)) if reason else verdict

    def record(self, export: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what keeptune reads again of an export."""
        plan = self.plan
        more: dict[str, Any] = {"quantization": self.quantization}
        if self.trained_on is not None:  # what is merged is no longer quantised
            more = {"trained_on": {"base": self.trained_on, **more}}
        return {
            "base": self.base,
            "labels": self.labels,
            "method": plan.method,
            "options": dict(plan.options),
            "provenance": dict(plan.provenance),
            "plan": plan.key,
            **{key: value for key, value in more.items() if value is not None},
            "export": dict(export),
        }

    def readme(self, export: Mapping[str, Any]) -> str:
        """Returns the README in the hub's format."""
        options, merged = json.dumps(dict(self.plan.options)), export["format"] == "merged"
        note = f"\nA merged model. {export['note']}.\n" if export["note"] else ""
        if export["error"]:
            note += f"\nCut to a smaller rank: {export['error']:.2%} of the trained change (Frobenius) is left out.\n"
        note += f"\nLabels, in the order of the outputs: {', '.join(self.labels)}.\n" if self.labels else ""
        fields = "" if self.quantization is None else f": `{json.dumps(dict(self.quantization), default=str)}`"
        if self.trained_on is not None:
            note += f"\nTrained on `{self.trained_on}` quantised{fields}; merged into the weights of `{self.base}`.\n"
        elif fields:
            note += f"\nFor the base quantised as it is loaded, as in training{fields}.\n"
        if export["original_gap"] is not None:
            note += (
                f"\nOn the original `{export['original']}` the same change computes other logits than in training: by "
                f"{export['original_gap']:.1e}, relative {export['original_relative_gap']:.1e}.\n"
            )
        note += f"\n{export['vllm']}.\n" if export["vllm"] else ""
        checked = "against the adapter on the original" if self.trained_on else "on a freshly loaded base"
        gap, relative = export["gap"], export["relative_gap"]
        return f"""---
base_model: {self.base}
library_name: {"transformers" if merged else "peft"}
tags: [keeptune, {self.plan.method}]
---

Tuned from `{self.base}` by keeptune with the method `{self.plan.method}` ({options}).

Checked {checked}: largest difference in logits {gap:.1e}, relative {relative:.1e}.
{note}
    {export["serve"]}
"""
