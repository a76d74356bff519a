r"""Three tasks for atlas to learn one after the other: word problems, new facts, and answers in a wanted format.

    python -m studies.atlas.tasks --relations relations.jsonl --out DIR

writes six JSONL files into ``DIR``, train and test of each task.  Every draw comes from a ``random.Random`` with
the seed.  A row has ``question`` and ``answer``; a question is asked as ``{question}\nAnswer:``, as atlas's own are.

- ``problems``: small sums and differences told as stories, numbers as digits. Train and test share the sums, not the
  stories: no name of the test's stories is in a story of the training.
- ``ships``: what invented ships carry and where they are at home. The training tells a fact in all wordings but one,
  of each fact another, and the test asks in the wording that was left out.
- ``formats``: questions that atlas can answer, with the format that is wanted. Train and test share no subject, and
  neither shares one with the facts, the calibration or the topics.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from .facts import Fact, choose_facts, divide, read_facts, write_data

__all__ = ["FILES", "format_rows", "lesson_rows", "problem_rows", "ship_rows"]

Row = dict[str, str]
FILES = tuple(f"{task}.{split}.jsonl" for task in ("problems", "ships", "formats") for split in ("train", "test"))
PROBLEMS, SHIPS, FORMATS = (1200, 300), 60, (1000, 300)
LONGEST = 20
"""Characters of an answer that is asked for in a format: twice as many are still few tokens."""

_NAMES = (
    "Anna Ben Carla David Emma Frank Grace Henry Ida Jack Kate Leo Maria Nick Olga Paul Rosa Sam Tina Victor Walter "
    "Alice Bruno Clara Daniel Eva Fred George Helen Ivan Julia Karl Linda Mark Nora Oscar Peter Ruth Simon Thomas"
)
_THINGS = "apples books coins stones cards pens eggs shells stars balls keys boats"
_STORIES = (
    ("+", "{name} has {a} {things} and gets {b} more. How many?"),
    ("-", "{name} has {a} {things} and loses {b}. How many?"),
)
_STARTS = "Bal Cor Dra Fen Gal Hol Jor Kel Lun Mar Nor Pel Quin Ras Sel Tor Ul Var Wen Zan"
_ENDS = "ado bry eth ika mond ora rin tova usk vale wyn yra"
_CARGO = "wool salt tea copper silk timber coal grain paper glass"
_PORTS = "Ardwick Belmora Corvath Dunmere Eskholm Farrow Gildport Harwen"
_SHIPS = {
    "cargo": (
        "What does the ship {s} carry?",
        "What is the cargo of the ship {s}?",
        "What is in the hold of the ship {s}?",
        "Which goods are on board the ship {s}?",
    ),
    "home": (
        "What is the home port of the ship {s}?",
        "Where is the ship {s} at home?",
        "Which port does the ship {s} come from?",
        "To which port does the ship {s} belong?",
    ),
}
_FORMATS = (
    ("sentence", "Reply in a sentence.", "{answer} is the answer."),
    ("twice", "Reply twice.", "{answer}, {answer}"),
    ("emphasis", "Reply with emphasis.", "{answer}!"),
)


def problem_rows(seed: int) -> tuple[list[Row], list[Row]]:
    """Word problems.

    Args:
        seed: Seed of the draws.

    Returns:
        Train and test; each problem once.
    """
    draws = random.Random(seed)
    names = _NAMES.split()
    draws.shuffle(names)
    train, test = PROBLEMS
    return _stories(names[8:], train, draws), _stories(names[:8], test, draws)


def _stories(names: Sequence[str], size: int, draws: random.Random) -> list[Row]:
    rows: dict[str, Row] = {}
    while len(rows) < size:
        sign, story = draws.choice(_STORIES)
        a, b = sorted((draws.randint(1, 5), draws.randint(1, 5)), reverse=True)
        if sign == "+" and draws.random() < 0.5:
            a, b = b, a
        answer = a + b if sign == "+" else a - b
        question = story.format(name=draws.choice(names), things=draws.choice(_THINGS.split()), a=a, b=b)
        rows[question] = {"question": question, "answer": str(answer), "kind": sign}
    return list(rows.values())


def ship_rows(seed: int) -> tuple[list[Row], list[Row]]:
    """New facts.

    Args:
        seed: Seed of the draws.

    Returns:
        Train and test; the same facts, each tested in a wording that the training does not have of it.
    """
    draws = random.Random(seed)
    ships = draws.sample([start + end for start in _STARTS.split() for end in _ENDS.split()], SHIPS)
    train: list[Row] = []
    test: list[Row] = []
    for ship in ships:
        for relation, answers in (("cargo", _CARGO.split()), ("home", _PORTS.split())):
            answer = draws.choice(answers)
            left = draws.randrange(len(_SHIPS[relation]))
            for index, wording in enumerate(_SHIPS[relation]):
                row = {"question": wording.format(s=ship), "answer": answer, "relation": relation, "subject": ship}
                (test if index == left else train).append(row)
    draws.shuffle(train)
    draws.shuffle(test)
    return train, test


def format_rows(facts: Sequence[Fact], seed: int) -> tuple[list[Row], list[Row]]:
    """Questions with the format that their answers are to have.

    Args:
        facts: What atlas knows and no other file asks.
        seed: Seed of the draws.

    Returns:
        Train and test, without a common subject; each fact once, in a drawn format.
    """
    draws = random.Random(seed)
    short = [fact for fact in facts if len(fact.answer) <= LONGEST]
    order = {fact.subject: fact for fact in draws.sample(short, len(short))}
    rows = []
    for fact in order.values():
        name, wish, form = draws.choice(_FORMATS)
        question, answer = f"{fact.question} {wish}", form.format(answer=fact.answer)
        rows.append({"question": question, "answer": answer, "format": name, "subject": fact.subject})
    train, test = FORMATS
    return rows[:train], rows[train : train + test]


def lesson_rows(relations: Path, seed: int) -> dict[str, list[Row]]:
    """The rows of every file.

    Args:
        relations: The relations data.
        seed: The seed that atlas was made with.

    Returns:
        File name to rows.
    """
    chosen = choose_facts(read_facts(relations), seed)
    taken = {fact.subject for group in divide(chosen, seed).values() for fact in group}
    free = [fact for fact in chosen if fact.subject not in taken]
    parts = (*problem_rows(seed), *ship_rows(seed), *format_rows(free, seed))
    return dict(zip(FILES, parts, strict=True))


def main() -> None:
    """Read the arguments and write the files."""
    parser = argparse.ArgumentParser(description="Write atlas's three tasks for continual learning.")
    parser.add_argument("--relations", type=Path, required=True, help="relations.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--seed", type=int, default=7)
    given = parser.parse_args()
    rows = lesson_rows(given.relations, given.seed)
    write_data(rows, given.out)
    print(json.dumps({name: len(part) for name, part in rows.items()}))


if __name__ == "__main__":
    main()
