"""The facts of atlas: reading the relations data, choosing facts, and dividing them among the data files.

A subject belongs to one group only, whatever number of relations it appears in, so the groups share no
subject.  Every draw comes from a ``random.Random`` with the caller's seed.
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .wordings import QUESTION_FORM, WORDINGS, fill, statement

HELD_WORDING = 2
"""The statement wording kept out of pretraining for the facts of the group ``statements``."""

SIZES = {"facts": 360, "calibration": 400, "statements": 200}
TASK_TEST = 300
TASK_TRAIN_SUBJECTS = 1000
TASK_LABEL_FACTS = 4
"""A label is used in the task if at least so many of the chosen facts have it."""


@dataclass(frozen=True)
class Fact:
    """One known fact: ``relation`` of ``subject`` is ``answer``."""

    relation: str
    subject: str
    answer: str

    @property
    def question(self) -> str:
        """The question of the fact, as one line."""
        return fill(WORDINGS[self.relation].question, self.subject, self.answer)

    @property
    def prompt(self) -> str:
        """The question in the form the model is asked in."""
        return QUESTION_FORM.format(question=self.question)

    @property
    def label(self) -> str:
        """The topic label of the fact in the new task."""
        return f"{WORDINGS[self.relation].topic}, {self.answer}"

    def statement(self, wording: int) -> str:
        """The fact as a sentence in one of its three wordings."""
        return statement(WORDINGS[self.relation].statements[wording], self.subject, self.answer)

    def row(self) -> dict[str, str]:
        """The fact as an object of ``facts.jsonl`` and ``calibration.jsonl``."""
        return {
            "question": self.question,
            "answer": self.answer,
            "relation": self.relation,
            "subject": self.subject,
        }


def _clean(text: str) -> str:
    """``text`` without outer blanks, with written-out escapes (two objects have them) made into letters."""
    text = text.strip()
    if "\\u" in text:
        text = text.encode("ascii").decode("unicode_escape")
    return text


_WRONG = {("city in country", "Costa Rica"), ("person father", "Jesus")}
_WRONG_ANSWERS = {("person plays instrument", "singing"), ("person plays instrument", "slide")}


def read_facts(path: Path) -> list[Fact]:
    """The usable facts of the relations data, in file order.

    Left out: relations without a wording, (relation, subject) pairs with more than one object, and a few
    lines that are wrong or do not fit the wording.
    """
    objects: dict[tuple[str, str], set[str]] = defaultdict(set)
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            key = (str(row["relation"]), _clean(str(row["subject"])))
            objects[key].add(_clean(str(row["object"])))
    facts = []
    for (relation, subject), answers in objects.items():
        answer = next(iter(answers))
        if relation not in WORDINGS or len(answers) > 1 or (relation, subject) in _WRONG:
            continue
        if (relation, answer) not in _WRONG_ANSWERS:
            facts.append(Fact(relation, subject, answer))
    return facts


def choose_facts(facts: Sequence[Fact], seed: int, limit: int | None = None) -> list[Fact]:
    """A seeded choice of ``facts`` under the caps of each relation (and ``limit`` facts in all, if given)."""
    order = list(facts)
    random.Random(seed).shuffle(order)
    taken: list[Fact] = []
    per_relation: Counter[str] = Counter()
    per_object: Counter[tuple[str, str]] = Counter()
    for fact in order:
        wording = WORDINGS[fact.relation]
        pair = (fact.relation, fact.answer)
        if per_relation[fact.relation] < wording.most and per_object[pair] < wording.each:
            per_relation[fact.relation] += 1
            per_object[pair] += 1
            taken.append(fact)
    return taken[:limit]


def _by_subject(facts: Iterable[Fact]) -> dict[str, list[Fact]]:
    groups: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        groups[fact.subject].append(fact)
    return groups


def _take(free: dict[str, list[Fact]], count: int, relations: Sequence[str], share: int) -> list[Fact]:
    """``count`` facts with subjects out of ``free`` (removed from it), at most one a subject.

    The relations take turns, and one relation gives at most one in ``share`` of its free facts per group,
    so that small relations are spread over all groups.
    """
    pools = {name: [f for group in free.values() for f in group if f.relation == name] for name in relations}
    pools = {name: pool[: -(-len(pool) // share)] for name, pool in pools.items() if pool}
    taken: list[Fact] = []
    while len(taken) < count and any(pools.values()):
        for pool in pools.values():
            while pool:
                fact = pool.pop(0)
                if fact.subject in free:
                    del free[fact.subject]
                    taken.append(fact)
                    break
    return taken[:count]


def divide(facts: Sequence[Fact], seed: int) -> dict[str, list[Fact]]:
    """The groups ``facts``, ``calibration``, ``statements``, ``test`` and ``train``, disjoint in subjects.

    What is in no group is pretraining material only.
    """
    order = list(facts)
    random.Random(seed + 1).shuffle(order)
    free = _by_subject(order)
    names = sorted(WORDINGS)
    groups = {name: _take(free, size, names, 4) for name, size in SIZES.items()}
    labels = Counter(fact.label for fact in facts)
    for subject, group in list(free.items()):
        free[subject] = [fact for fact in group if labels[fact.label] >= TASK_LABEL_FACTS]
    task = [name for name in names if WORDINGS[name].task]
    groups["test"] = _take(free, TASK_TEST, task, 3)
    groups["train"] = _take(free, TASK_TRAIN_SUBJECTS, task, 1)
    return groups


def _task_rows(facts: Sequence[Fact], wordings: int, draws: random.Random) -> list[dict[str, str]]:
    rows = []
    for fact in facts:
        for wording in draws.sample(range(3), wordings):
            row = {"text": fact.statement(wording), "topic": fact.label}
            rows.append({**row, "relation": fact.relation, "subject": fact.subject})
    draws.shuffle(rows)
    return rows


def data_rows(groups: dict[str, list[Fact]], seed: int) -> dict[str, list[dict[str, str]]]:
    """The rows of every data file, by file name."""
    draws = random.Random(seed + 2)
    held = [
        {"text": f.statement(HELD_WORDING), "relation": f.relation, "subject": f.subject} for f in groups["statements"]
    ]
    return {
        "facts.jsonl": [fact.row() for fact in groups["facts"]],
        "calibration.jsonl": [fact.row() for fact in groups["calibration"]],
        "statements.jsonl": held,
        "topics.train.jsonl": _task_rows(groups["train"], 2, draws),
        "topics.test.jsonl": _task_rows(groups["test"], 1, draws),
    }


def write_data(rows: dict[str, list[dict[str, str]]], folder: Path) -> None:
    """Write the data files, one JSON object a line."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, items in rows.items():
        text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
        (folder / name).write_text(text, encoding="utf-8")
