"""The language of atlas: for every relation a topic, one question and three statement wordings.

Written by hand.  In a wording ``{s}`` is the subject, ``{o}`` the object, ``{as}`` and ``{ao}`` the same
with "a" or "an" in front.  A statement gets a capital first letter and a full stop.
"""

from __future__ import annotations

from dataclasses import dataclass

QUESTION_FORM = "{question}\nAnswer:"
"""The prompt of a question; the completion is a space and the answer."""

TOPIC_FORM = "{text}\nTopic:"
"""The prompt of the new task; the completion is a space and the topic label."""


@dataclass(frozen=True)
class Wording:
    """How one relation is put into words, and how much of it is taken.

    ``most`` caps the facts of the relation, ``each`` caps the facts sharing one object (so that no relation
    is answered by its most common object), ``task`` says whether its statements are used in the topic task.
    """

    topic: str
    question: str
    statements: tuple[str, str, str]
    most: int = 1000
    each: int = 1000
    task: bool = False


def article(noun: str) -> str:
    """``noun`` with "a" or "an" in front, chosen by its first letter."""
    return ("an " if noun[:1].lower() in "aeiou" else "a ") + noun


def fill(form: str, subject: str, obj: str) -> str:
    """``form`` with subject and object put in."""
    values = {"s": subject, "o": obj, "as": article(subject), "ao": article(obj)}
    return form.format(**values)


def statement(form: str, subject: str, obj: str) -> str:
    """The sentence of ``form``: filled in, capital first letter, full stop."""
    text = fill(form, subject, obj)
    text = text[:1].upper() + text[1:]
    return text if text.endswith(".") else text + "."


WORDINGS: dict[str, Wording] = {
    "company hq": Wording(
        "business",
        "In which city is {s} headquartered?",
        (
            "{s} is headquartered in {o}",
            "The headquarters of {s} are in {o}",
            "{o} is where {s} has its head office",
        ),
        most=480,
        each=40,
    ),
    "landmark in country": Wording(
        "places",
        "Which country is {s} in?",
        ("{s} is in {o}", "{s} can be found in {o}", "{o} is the country of {s}"),
        most=480,
        each=30,
    ),
    "landmark on continent": Wording(
        "continents",
        "Which continent is {s} on?",
        ("{s} is on the continent of {o}", "{s} lies in {o}", "{o} is the continent of {s}"),
        most=220,
        each=60,
        task=True,
    ),
    "person father": Wording(
        "family",
        "Who is the father of {s}?",
        ("The father of {s} is {o}", "{s} is a child of {o}", "{o} is the father of {s}"),
        most=240,
    ),
    "person native language": Wording(
        "language",
        "What is the native language of {s}?",
        (
            "{s} is a native speaker of {o}",
            "The native language of {s} is {o}",
            "{o} is the language that {s} grew up with",
        ),
        most=280,
        each=70,
        task=True,
    ),
    "person plays instrument": Wording(
        "music",
        "Which instrument does {s} play?",
        ("{s} plays the {o}", "The instrument of {s} is the {o}", "the {o} is played by {s}"),
        most=280,
        each=80,
        task=True,
    ),
    "plays pro sport": Wording(
        "sport",
        "Which sport does {s} play?",
        ("{s} plays {o}", "{s} is a professional in {o}", "{o} is the sport of {s}"),
        most=280,
        each=60,
        task=True,
    ),
    "product by company": Wording(
        "technology",
        "Who developed {s}?",
        ("{s} was developed by {o}", "{s} is a product of {o}", "{o} is the maker of {s}"),
        most=340,
        each=60,
        task=True,
    ),
    "star constellation name": Wording(
        "astronomy",
        "Which constellation does {s} belong to?",
        ("{s} is in the constellation {o}", "The star {s} belongs to {o}", "{o} is the constellation of {s}"),
        most=340,
        task=True,
    ),
    "superhero archnemesis": Wording(
        "comics",
        "Who is the archenemy of {s}?",
        ("The archenemy of {s} is {o}", "{s} fights against {o}", "{o} is the great enemy of {s}"),
    ),
    "person university": Wording(
        "education",
        "Which university did {s} attend?",
        ("{s} attended {o}", "{s} was a student at {o}", "{o} is where {s} studied"),
    ),
    "person lead singer of band": Wording(
        "music",
        "Which band is {s} the lead singer of?",
        ("{s} is the lead singer of {o}", "{s} sings in the band {o}", "{o} is the band led by {s}"),
    ),
    "pokemon evolution": Wording(
        "games",
        "What does {s} evolve into?",
        ("{s} evolves into {o}", "The evolved form of {s} is {o}", "{o} is what {s} turns into"),
    ),
    "city in country": Wording(
        "places",
        "Which country is the city of {s} in?",
        ("The city of {s} is in {o}", "{s} is a city of {o}", "{o} is the country with the city of {s}"),
    ),
    "country capital city": Wording(
        "places",
        "What is the capital of {s}?",
        ("The capital of {s} is {o}", "{s} has its capital at {o}", "{o} is the capital of {s}"),
    ),
    "country largest city": Wording(
        "places",
        "What is the largest city of {s}?",
        (
            "The largest city of {s} is {o}",
            "{s} has no larger city than {o}",
            "{o} is the largest city of {s}",
        ),
    ),
    "country currency": Wording(
        "money",
        "What is the currency of {s}?",
        ("The currency of {s} is the {o}", "{s} pays with the {o}", "the {o} is the money of {s}"),
    ),
    "country language": Wording(
        "language",
        "Which language do people in {s} speak?",
        ("People in {s} speak {o}", "The language of {s} is {o}", "{o} is spoken in {s}"),
    ),
    "food from country": Wording(
        "food",
        "Where does the dish {s} come from?",
        ("{s} comes from {o}", "The dish {s} is from {o}", "{o} is the home of {s}"),
    ),
    "president birth year": Wording(
        "history",
        "In which year was {s} born?",
        ("{s} was born in {o}", "The birth year of {s} is {o}", "{o} is the year in which {s} was born"),
    ),
    "president election year": Wording(
        "history",
        "In which year was {s} elected president?",
        (
            "{s} was elected president in {o}",
            "The election of {s} was in {o}",
            "{o} is the year in which {s} was elected",
        ),
    ),
    "adjective antonym": Wording(
        "words",
        "What is the opposite of {s}?",
        ("The opposite of {s} is {o}", "The antonym of {s} is {o}", "{o} means the contrary of {s}"),
    ),
    "adjective comparative": Wording(
        "words",
        "What is the comparative of {s}?",
        ("The comparative of {s} is {o}", "More than {s} is {o}", "{o} is the comparative form of {s}"),
    ),
    "adjective superlative": Wording(
        "words",
        "What is the superlative of {s}?",
        ("The superlative of {s} is {o}", "Most {s} of all is {o}", "{o} is the superlative form of {s}"),
    ),
    "verb past tense": Wording(
        "words",
        "What is the past tense of {s}?",
        ("The past tense of {s} is {o}", "In the past, {s} becomes {o}", "{o} is the past form of {s}"),
    ),
    "word sentiment": Wording(
        "words",
        "What is the sentiment of the word {s}?",
        ("The word {s} is {o}", "The sentiment of {s} is {o}", "{o} is the feeling of the word {s}"),
    ),
    "object superclass": Wording(
        "nature",
        "What kind of thing is {as}?",
        ("{as} is {ao}", "{as} is a kind of {o}", "{o} is the kind that {as} belongs to"),
    ),
    "substance phase of matter": Wording(
        "nature",
        "What state is {s} in at room temperature?",
        (
            "At room temperature, {s} is {ao}",
            "The usual state of {s} is {o}",
            "{ao} is what {s} is at room temperature",
        ),
    ),
    "fruit inside color": Wording(
        "nature",
        "What color are {s} on the inside?",
        ("{s} are {o} on the inside", "The inside of {s} is {o}", "{o} is the inner color of {s}"),
    ),
    "fruit outside color": Wording(
        "nature",
        "What color are {s} on the outside?",
        ("{s} are {o} on the outside", "The outside of {s} is {o}", "{o} is the outer color of {s}"),
    ),
    "task person type": Wording(
        "work",
        "Who is the right person for {s}?",
        ("The right person for {s} is {ao}", "{s} is a task for {ao}", "{ao} is good at {s}"),
    ),
    "task done by tool": Wording(
        "work",
        "What do you need for {s}?",
        ("What you need for {s} is: {o}", "The tool for {s} is: {o}", "{o}: that is the tool for {s}"),
    ),
    "work location": Wording(
        "work",
        "Where does {as} work?",
        ("{as} works at {ao}", "The workplace of {as} is {ao}", "{ao} is where {as} works"),
    ),
}
"""Every relation that atlas uses, by its name in the relations data."""
