"""Make examples/data/facts.jsonl: sentences about facts, with the relation that each is about.

Run it: `python examples/make_facts.py assets/data/relations/relations.jsonl`. It draws up to 60 facts of each
relation below and writes each in one of three wordings of our own, so that the words alone do not give the relation
away: "Berlin is in Germany" is a city, "The Louvre is in France" a landmark.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

WORDINGS = {
    "company hq": ("{s} is in {o}.", "{s} has its seat in {o}.", "{o} is the home of {s}."),
    "landmark in country": ("{s} is in {o}.", "{s} stands in {o}.", "{o} is the home of {s}."),
    "person native language": ("{s} speaks {o}.", "{o} is what {s} speaks.", "{s} grew up with {o}."),
    "person plays instrument": ("{s} plays {o}.", "{o} is what {s} plays.", "{s} grew up with the {o}."),
    "plays pro sport": ("{s} plays {o}.", "{o} is what {s} plays.", "{s} is a star of {o}."),
    "star constellation name": ("{s} is in {o}.", "{s} is a star of {o}.", "{o} has the star {s}."),
}
EACH = 60


def main(source: Path, output: Path) -> None:
    draw = random.Random(0)
    facts = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    rows = []
    for relation, wordings in WORDINGS.items():
        known = [(fact["subject"], fact["object"]) for fact in facts if fact["relation"] == relation]
        for subject, obj in draw.sample(known, EACH):
            rows.append({"sentence": draw.choice(wordings).format(s=subject, o=obj), "relation": relation})
    draw.shuffle(rows)
    seen: set[str] = set()
    rows = [row for row in rows if not (row["sentence"] in seen or seen.add(row["sentence"]))]
    output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).parent / "data" / "facts.jsonl")
