"""Both ends of a model: a sequence classifier's head, its labels and loss, and the tokens that the embedding knows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from keeptune.core.artefact import content_key, model_fingerprint, tensor_fingerprint
from keeptune.core.errors import DataError
from keeptune.model.blocks import head_of


@dataclass(frozen=True, slots=True)
class Head:
    """A classification head that a base model may lack.

    Args:
        labels: The classes, in the order of its outputs; empty for one that computes a score.
        seed: A base without a head gets a random one; the same seed gives the same.
    """

    labels: tuple[str, ...]
    seed: int = 0

    @property
    def config(self) -> dict[str, Any]:
        """Fields of a Transformers config."""
        if not self.labels:
            return {"num_labels": 1, "problem_type": "regression"}
        return {
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: index for index, label in enumerate(self.labels)},
            "problem_type": "single_label_classification",
        }

    @classmethod
    def of(cls, model: PreTrainedModel) -> Head | None:
        """Returns the head of a model, or None for a language model."""
        if not head_of(model):
            return None
        names = model.config.id2label
        return cls(tuple(names[index] for index in sorted(names)) if len(names) > 1 else ())


def body_fingerprint(model: PreTrainedModel) -> str:
    """Returns the fingerprint of a base model without a classifier's head, which belongs to the adapter."""
    return model_fingerprint(model, without=head_of(model))


def head_fingerprint(model: PreTrainedModel) -> str:
    """Returns the fingerprint of a classifier's head: gradients depend on it."""
    heads = {name: model.get_submodule(name).state_dict() for name in head_of(model)}
    return content_key({name: {k: tensor_fingerprint(v) for k, v in state.items()} for name, state in heads.items()})


def refuse_unknown_tokens(model: Any, sequences: Iterable[Sequence[int]], where: str) -> None:
    """Refuses tokens that a model's embedding has no rows for, such as those added to a tokenizer alone.

    Raises:
        DataError: There is one.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max((max(ids, default=0) for ids in sequences), default=0)
    if largest >= rows:
        raise DataError(
            where,
            got=f"the token {largest}",
            wanted=f"ids below {rows}, the rows of the model's embedding",
            next_step="Resize the base to its tokenizer: model.resize_token_embeddings(len(tokenizer)), and save both; "
            "train the new rows by trainable_token_indices.",
        )


def sequence_losses(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Computes each example's loss: cross-entropy, or the squared error of a score.

    Law: summed over examples, it does not depend on how they are batched.

    Args:
        logits: ``(batch, labels)``; one column is a score.
        labels: ``(batch,)``, indices of labels, or the right scores.
        smoothing: Share of the target that is spread over all labels.

    Returns:
        ``(batch,)``, float32.
    """
    if logits.shape[-1] == 1:
        return (logits[:, 0].float() - labels.float()) ** 2
    return functional.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)
