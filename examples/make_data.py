"""Writes the data of the three demo adapters: `python examples/make_data.py` gives the same bytes everywhere.

    negate      "Two drivers repaired the old clock."  →  "Two drivers did not repair the old clock."
    past-tense  "Two drivers repair the old clock."    →  "Two drivers repaired the old clock."
    reminder    "On Friday at 3 pm, remind Anna to call the bank."
                →  {"who": "Anna", "task": "call the bank", "day": "friday", "time": "3 pm"}

Sentences are put together from the word lists below. Training and held-out rows share the words, never a
combination: of all pairs (subject, verb with its object), each is used on one side only.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

TRAINING_ROWS = 360
HELD_OUT_ROWS = 100

SINGULAR = [
    "The nurse",
    "The young painter",
    "My brother",
    "Our neighbour",
    "The captain",
    "Maria",
    "She",
    "He",
]
PLURAL = ["The nurses", "Two drivers", "My sisters", "Our guests", "The farmers", "They", "We", "You", "I"]
# infinitive, third person, past
VERBS = [
    ("open", "opens", "opened"),
    ("repair", "repairs", "repaired"),
    ("carry", "carries", "carried"),
    ("wash", "washes", "washed"),
    ("buy", "buys", "bought"),
    ("sell", "sells", "sold"),
    ("find", "finds", "found"),
    ("hide", "hides", "hid"),
    ("bring", "brings", "brought"),
    ("draw", "draws", "drew"),
    ("break", "breaks", "broke"),
    ("take", "takes", "took"),
    ("see", "sees", "saw"),
    ("lose", "loses", "lost"),
    ("need", "needs", "needed"),
    ("like", "likes", "liked"),
]
OBJECTS = [
    "the old clock",
    "a wooden box",
    "the blue bicycle",
    "three letters",
    "the garden chairs",
    "a warm coat",
    "the kitchen lamp",
    "some maps",
]
STATES = ["tired", "at home", "ready for the trip", "in the garden", "very hungry", "late again"]

PEOPLE = ["Anna", "Ben", "Chloe", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas"]
ERRANDS = [
    f"{action} {thing}"
    for action, things in {
        "call": ["the bank", "the dentist", "grandma"],
        "pay": ["the rent", "the gas bill", "the plumber"],
        "pick up": ["the parcel", "the kids", "the dry cleaning"],
        "send": ["the invoice", "the contract", "the photos"],
        "book": ["a table", "the flights", "a room"],
    }.items()
    for thing in things
]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
HOURS = [f"{hour % 12 or 12} {'am' if hour < 12 else 'pm'}" for hour in range(7, 22)]
REQUESTS = [
    "Remind {who} to {task} on {day} at {time}.",
    "On {day} at {time}, remind {who} to {task}.",
    "Please tell {who} to {task} at {time} on {day}.",
    "{who} has to {task} on {day} at {time}.",
]

Row = tuple[str, str]  # prompt, completion
Make = Callable[[tuple[str, str], random.Random], Row]


def negate(pair: tuple[str, str], chance: random.Random) -> Row:
    subject, rest = pair
    single = subject in SINGULAR
    if rest in STATES:
        be = chance.choice(["is", "was"] if single else ["am", "was"] if subject == "I" else ["are", "were"])
        return f"{subject} {be} {rest}.", f"{subject} {be} not {rest}."
    infinitive, third, past, thing = _verb(rest)
    form = chance.choice(["present", "past", "will", "should"])
    if form == "present":
        verb, auxiliary = (third, "does") if single else (infinitive, "do")
    elif form == "past":
        verb, auxiliary = past, "did"
    else:
        verb, auxiliary = f"{form} {infinitive}", form
    return f"{subject} {verb} {thing}.", f"{subject} {auxiliary} not {infinitive} {thing}."


def past_tense(pair: tuple[str, str], chance: random.Random) -> Row:
    subject, rest = pair
    single = subject in SINGULAR
    if rest in STATES:
        now, then = ("is", "was") if single else ("am", "was") if subject == "I" else ("are", "were")
        return f"{subject} {now} {rest}.", f"{subject} {then} {rest}."
    infinitive, third, past, thing = _verb(rest)
    adverb = chance.choice(["", "", "often ", "never "])
    return (
        f"{subject} {adverb}{third if single else infinitive} {thing}.",
        f"{subject} {adverb}{past} {thing}.",
    )


def reminder(pair: tuple[str, str], chance: random.Random) -> Row:
    who, task = pair
    day = chance.choice(DAYS)
    time = chance.choice(HOURS)
    prompt = chance.choice(REQUESTS).format(who=who, task=task, day=day, time=time)
    return prompt, json.dumps({"who": who, "task": task, "day": day.lower(), "time": time})


def _verb(rest: str) -> tuple[str, str, str, str]:
    infinitive, thing = rest.split(" ", 1)
    third, past = next((third, past) for name, third, past in VERBS if name == infinitive)
    return infinitive, third, past, thing


CLAUSES = [f"{verb[0]} {thing}" for verb, thing in product(VERBS, OBJECTS)]
# States are repeated so that they make up about a quarter of the sentences.
SENTENCES = list(product(SINGULAR + PLURAL, CLAUSES)) + list(product(SINGULAR + PLURAL, STATES)) * 6
TASKS: dict[str, tuple[list[tuple[str, str]], Make]] = {
    "negate": (SENTENCES, negate),
    "past-tense": (SENTENCES, past_tense),
    "reminder": (list(product(PEOPLE, ERRANDS)) * 5, reminder),
}


def rows(name: str) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows of a task, decided by its name alone."""
    pairs, make = TASKS[name]
    chance = random.Random(f"veneer {name}")
    different = sorted(set(pairs))
    chance.shuffle(different)
    held_out_pairs = set(different[: len(different) // 4])
    drawn = list(pairs)
    chance.shuffle(drawn)
    sides = [p for p in drawn if p not in held_out_pairs], [p for p in drawn if p in held_out_pairs]
    training, held_out = (_different(side, make, chance) for side in sides)
    return _first(training, TRAINING_ROWS), _first(held_out, HELD_OUT_ROWS)


def _different(pairs: list[tuple[str, str]], make: Make, chance: random.Random) -> Iterator[Row]:
    seen: set[Row] = set()
    for pair in pairs:
        row = make(pair, chance)
        if row not in seen:
            seen.add(row)
            yield row


def _first(made: Iterator[Row], count: int) -> list[Row]:
    return [row for row, _ in zip(made, range(count), strict=False)]


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in TASKS:
        for side, made in zip(("train", "test"), rows(name), strict=True):
            lines = [json.dumps({"prompt": prompt, "completion": answer}) + "\n" for prompt, answer in made]
            (folder / f"{name}.{side}.jsonl").write_bytes("".join(lines).encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data")
