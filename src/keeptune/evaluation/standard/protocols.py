r"""How papers prompt and score where they do not use lm-eval: each a prompt, stop words, a limit and a pure function.

``metamath``
    GSM8K and MATH as MetaMath's scripts have them (Yu et al., ICLR 2024), which PiSSA, CorDA, LoRA-Null and FARSS use:
    the Alpaca prompt, no examples, and only what follows the literal ``The answer is: `` counts. A model that does
    not write these words scores 0, an untuned base above all.
``llm-adapters``
    The commonsense sets as LLM-Adapters has them (Hu et al., EMNLP 2023), which L2-LoRA and FARSS use: the model writes
    ``answer2``, and the first such word counts. The scripts decode with 4 beams; here as everywhere greedily.
``bigcode``
    HumanEval and MBPP as bigcode-evaluation-harness prompts them, which LoRA-Null uses; it samples at temperature 0.2,
    here one greedy answer is run. FARSS uses evalplus, whose extra tests are not here.
``peft``
    GSM8K as PEFT's method comparison has it: MetaMathQA's question, and what follows the last announced answer counts.
``generated``
    WebQS by generation and exact match, as lm-eval has TriviaQA; lm-eval's own WebQS asks whether the likeliest
    tokens are those of an accepted answer, without writing anything.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from keeptune.data.sources import Row
from keeptune.evaluation.metrics import exact_match
from keeptune.evaluation.standard.entry import NAMES

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response: Let's think step by step."
)
# The scripts stop at the bare words too, wherever they stand in a solution.
_METAMATH_STOPS = ("Instruction:", "Instruction", "Response:", "Response")
_PHRASE = "The answer is: "
_ANNOUNCED = (_PHRASE, "The answer is ", "The final answer is: ", "The final answer is ", "#### ")
# One separator at most: of "1,234,567" it takes 1,234. So do the scripts.
_NUMBER = re.compile(r"[\-+]?\d*[\.,/]?\d+")


@dataclass(frozen=True, slots=True)
class Protocol:
    """One benchmark as a paper's scripts have it."""

    prompt: Callable[[Row], str]
    target: Callable[[Row], str]  # what is right, for the record
    stops: tuple[str, ...]  # texts before which an answer ends
    new_tokens: int  # generated at most
    right: Callable[[Row, str], float] | None  # row and generated text to 1 or 0; None: the text is a program to run
    task: tuple[str, tuple[str, ...]] | None = None  # lm-eval's and its folders, if not the standard one


def metamath_number(text: str) -> int | None:
    """Returns the number after the last ``The answer is: ``, rounded; None without the phrase or a number after it.

    >>> metamath_number("So 6 + 2 = 8. The answer is: 8")
    8
    >>> metamath_number("The answer is: 7/2"), metamath_number("The answer is: $1,200.50")
    (4, 1200)
    >>> metamath_number("#### 8") is None
    True
    """
    parts = text.split(_PHRASE)
    match = _NUMBER.search(parts[-1].strip()) if len(parts) > 1 else None
    if match is None:
        return None
    numerator, slash, denominator = match[0].replace(",", "").partition("/")
    if not slash or (numerator not in ("", "+", "-") and int(denominator) == 0):
        # A division by 0 gives the numerator, as in the scripts.
        value = float(numerator)
        return None if math.isinf(value) else round(value)
    return None if numerator in ("", "+", "-") else round(float(Fraction(int(numerator), int(denominator))))


def metamath_gold(answer: str) -> int:
    """Returns the right number of a GSM8K row, whose answer ends in ``#### 1,234``."""
    return int(answer.split("#### ")[1].replace(",", ""))


def peft_answer(text: str) -> Fraction | str | None:
    """Returns what follows the last announcement of an answer in a text, a number where it reads as one.

    >>> peft_answer("3 + 4 = 7. The answer is: 7.00")
    Fraction(7, 1)
    """
    text = text.strip().rstrip(".!?")
    phrase = next((phrase for phrase in _ANNOUNCED if phrase in text), None)
    if phrase is None:
        return None
    found = text.rpartition(phrase)[2].strip().split("\n", 1)[0].strip(" .!?$%")
    try:
        return Fraction(found)
    except (ValueError, ZeroDivisionError):
        return found


def metamath_math(row: Row, text: str) -> float:
    """Returns 1 if what follows the last ``The answer is: `` is the answer in a MATH solution's box, else 0.

    They are compared but for notation (Hendrycks et al., NeurIPS 2021).
    """
    from lm_eval.tasks.hendrycks_math.utils import is_equiv

    parts = text.split(_PHRASE)
    said = parts[-1].split(".\n")[0].strip().removesuffix(".").strip()
    return float(len(parts) > 1 and is_equiv(said, row["answer"]))


def adapters_instruction(name: str, row: Row) -> tuple[str, str]:
    """Returns a row of the hub's data in LLM-Adapters' instruction form, and the right word, such as ``answer2``."""
    if name == "boolq":
        body = f"Please answer the following question with true or false, question: {row['question']}?"
        return f"{body}\n\nAnswer format: true/false", "true" if row["label"] else "false"
    word, between, gap = NAMES[name].word, " ", "\n\n"
    task = f"Please choose the correct {word} to"
    if name == "piqa":
        question, choices, right = f"{task} the question: {row['goal']}", [row["sol1"], row["sol2"]], int(row["label"])
        between = "\n\n"
    elif name == "winogrande":
        blank = "Please choose the correct answer to fill in the blank to complete the given sentence"
        question, choices = f"{blank}: {row['sentence']}", [row["option1"], row["option2"]]
        gap, right = " ", int(row["answer"]) - 1
    elif name == "hellaswag":
        question = f"{task} complete the given sentence: {row['activity_label']}: {row['ctx']}"
        choices, right = row["endings"], int(row["label"])
    else:
        question = f"{task} the question: {row['question_stem' if name == 'openbookqa' else 'question']}"
        choices, right = row["choices"]["text"], row["choices"]["label"].index(row["answerKey"].strip())
    words = [f"{word}{number}" for number in range(1, len(choices) + 1)]
    listed = between.join(f"{own.capitalize()}: {choice}" for own, choice in zip(words, choices, strict=True))
    return f"{question}\n\n{listed}{gap}Answer format: {'/'.join(words)}", words[right]


def adapters_answer(name: str, text: str) -> str:
    """Returns the first answer word of a generated text; empty where there is none.

    >>> adapters_answer("arc_easy", " the correct answer is answer3, not answer1")
    'answer3'
    """
    words = "true|false" if name == "boolq" else "|".join(f"{NAMES[name].word}{number}" for number in range(1, 6))
    match = re.search(words, text.strip())
    return match[0] if match else ""


def _adapters(name: str) -> Protocol:
    # The indented form of the scripts: trained and scored on the same odd white space.
    pad = " " * 16
    form = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request. "
        f"\n\n{pad}### Instruction:\n{pad}{{}}\n\n{pad}### Response:\n{pad}"
    )
    return Protocol(
        prompt=lambda row: form.format(adapters_instruction(name, row)[0]),
        target=lambda row: adapters_instruction(name, row)[1],
        stops=(),
        new_tokens=32,
        right=lambda row, text: float(adapters_answer(name, text) == adapters_instruction(name, row)[1]),
    )


PROTOCOLS: Mapping[tuple[str, str], Protocol] = {
    ("metamath", "gsm8k"): Protocol(
        prompt=lambda row: _ALPACA.format(instruction=row["question"]),
        target=lambda row: str(metamath_gold(row["answer"])),
        stops=_METAMATH_STOPS,
        new_tokens=1024,
        right=lambda row, text: float(metamath_number(text) == metamath_gold(row["answer"])),
    ),
    ("peft", "gsm8k"): Protocol(
        prompt=lambda row: f"Question: {row['question']} Think step by step.\nAnswer:",
        target=lambda row: str(row["answer"]),
        stops=(),
        new_tokens=300,
        right=lambda row, text: float(peft_answer(text) == peft_answer(row["answer"])),
    ),
    ("metamath", "math"): Protocol(
        prompt=lambda row: _ALPACA.format(instruction=row["problem"]),
        target=lambda row: str(row["answer"]),
        stops=_METAMATH_STOPS,
        new_tokens=2048,
        right=metamath_math,
        task=("hendrycks_math", ("hendrycks_math",)),
    ),
    ("generated", "webqs"): Protocol(
        prompt=lambda row: f"Question: {row['question']}\nAnswer:",
        target=lambda row: str(row["answers"][0]),
        stops=("\n", ".", ","),
        new_tokens=32,
        right=lambda row, text: exact_match(text, row["answers"]),
    ),
    ("bigcode", "humaneval"): Protocol(
        prompt=lambda row: str(row["prompt"]).strip(),
        target=lambda row: str(row["entry_point"]),
        stops=("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```", "<file_sep>"),
        new_tokens=512,
        right=None,
    ),
    ("bigcode", "mbpp"): Protocol(
        prompt=lambda row: f'"""\n{row["text"]}\n{row["test_list"][0]}\n"""\n',
        target=lambda row: "\n".join(row["test_list"]),
        stops=("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```"),
        new_tokens=512,
        right=None,
    ),
    **{("llm-adapters", name): _adapters(name) for name, row in NAMES.items() if "llm-adapters" in row.scorings},
}


def overrides_of(protocol: Protocol, run_metric: str, run: Any) -> dict[str, Any]:
    """Returns a protocol as fields of an lm-eval task's configuration.

    Answers that are programs are scored by ``run``, lm-eval's ``process_results``, under the metric ``run_metric``.
    """
    right = protocol.right
    metric = run_metric if right is None else "exact_match"
    return {
        "output_type": "generate_until",
        "doc_to_text": protocol.prompt,
        "doc_to_target": protocol.target,
        "doc_to_choice": None,
        "description": "",
        "gen_prefix": None,
        "generation_kwargs": {
            "until": list(protocol.stops),
            "max_gen_toks": protocol.new_tokens,
            "do_sample": False,
            "temperature": 0.0,
        },
        "filter_list": None,
        "process_results": run if right is None else lambda doc, results: {metric: right(doc, results[0])},
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
        "num_fewshot": 0,
        "fewshot_config": None,
        "fewshot_split": None,
        "repeats": 1,
    }
