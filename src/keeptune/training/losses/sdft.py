"""SDFT: Shenfeld et al., Self-Distillation Enables Continual Learning, 2601.19897.

The model, shown the data's answer c to a prompt x, teaches itself on what it writes without having seen c.

    y ~ p(. | x)^(1/temperature)                at each step anew; the likeliest tokens at 0                    (1)
    l_t = (1 - a) KL(p || m) + a KL(q || m)     p = p(. | x, y_<t),  q = p_teacher(. | T(x, c), y_<t),
                                                m = (1 - a) p + a q; KL(q || p) at a = 0, KL(p || q) at 1       (2)
    L = mean over texts of the mean over t of l_t                                                               (3)
    v <- (1 - u) v + u w                        after each step; v the teacher's trained parameters, w ours     (4)

T is the template, KL over the whole vocabulary. TRL's experimental trainer does (1) to (3), with the teacher of (4) put
in (training/self_distillation.py). As released: a = 0 (the paper has the reverse KL, a = 1), u = 0.01, the template for
chats, 1,024 new tokens. Departure: (4) is of the factors of an adapter, not of B A.
"""

from dataclasses import dataclass

from keeptune.core.options import Range
from keeptune.training.losses.base import TaskLoss

_SHARE = Range(least=0, most=1)


@dataclass(frozen=True)
class Sdft(TaskLoss):
    """The distance to the model that was shown the answer, on texts that the model in training writes itself.

    Args:
        max_completion_length: Tokens that are written of a text at most; a step's time is mostly theirs.
        temperature: Of (1), and of p and q in (2); 0 writes the likeliest tokens, and compares at 1.
        distillation_alpha: a.
        teacher_update_rate: u; at 0 the teacher stays what training starts from.
        teacher_prompt_template: T, with ``{prompt}`` and ``{privileged_context}``; None takes the released one for
            chats, and for texts the prompt with its answer, a blank line, and the prompt again.
        num_loss_tokens_to_skip: How many tokens at the beginning of a text do not count; 3 as released.
    """

    name = "sdft"
    paper = "Shenfeld et al., SDFT, 2601.19897"
    reads = "own texts"
    ranges = {
        "max_completion_length": Range(least=1),
        "temperature": Range(least=0),
        "distillation_alpha": _SHARE,
        "teacher_update_rate": _SHARE,
        "num_loss_tokens_to_skip": Range(least=0),
    }

    max_completion_length: int = 64
    temperature: float = 1.0
    distillation_alpha: float = 0.0
    teacher_update_rate: float = 0.01
    teacher_prompt_template: str | None = None
    num_loss_tokens_to_skip: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        fields, text = ("{prompt}", "{privileged_context}"), self.teacher_prompt_template
        rest = (text or "").replace(fields[0], "").replace(fields[1], "")
        right = text is None or (all(field in text for field in fields) and not {"{", "}"} & set(rest))
        self.need(right, "teacher_prompt_template", f"a text with {' and '.join(fields)} and no other braces")
