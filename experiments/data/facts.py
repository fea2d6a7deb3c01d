"""Knowledge: facts about people, towns and machines that do not exist, so no model can know them.

They are generated, always the same ones. Each fact is asked in five wordings: three are for training, one is for
validation, one is held out. So whatever is asked was taught, in other words; no wording is in two parts. The answer is
a name or a number alone, one for a fact.
"""

import functools
import random
from dataclasses import dataclass

TASK = "Answer the question with the name or the number alone."

KINDS = {"person": 24, "town": 18, "machine": 18}  # how many of each there are
STARTS = ("Al", "Bre", "Cor", "Dul", "Es", "Fen", "Gri", "Hal", "Jor", "Kes", "Lum", "Mor", "Nel", "Or", "Pra", "Quil")
ENDS = ("bek", "dran", "fin", "gar", "lisk", "mund", "nath", "pel", "rov", "sten", "tor", "vane", "wick", "yra", "zel")

CRAFTS = ("baker", "cooper", "dyer", "glazier", "mason", "saddler", "tailor", "weaver", "painter", "surveyor")
INSTRUMENTS = ("banjo", "bassoon", "cello", "clarinet", "flute", "harp", "lute", "oboe", "trumpet", "viola")
ANIMALS = ("badger", "donkey", "falcon", "goat", "heron", "otter", "parrot", "raven", "tortoise", "weasel")
GOODS = ("almonds", "barley", "candles", "cheese", "copper", "glass", "honey", "pears", "salt", "wool")
COLOURS = ("amber", "black", "blue", "crimson", "green", "grey", "orange", "purple", "white", "yellow")
MATERIALS = ("brass", "bronze", "cork", "granite", "iron", "leather", "marble", "oak", "steel", "tin")
TASKS = ("comb wool", "cut paper", "dry hops", "grind spice", "lift water", "press oil", "saw stone", "sort seed")

# By kind of entity and relation: where its values come from ("name": made up, "year": a number), and the wordings, of
# which the last but one is for validation and the last is held out.
RELATIONS: dict[str, dict[str, tuple[tuple[str, ...] | str, tuple[str, ...]]]] = {
    "person": {
        "birthplace": (
            "name",
            (
                "Where was {} born?",
                "Name the birthplace of {}.",
                "Fill the gap: {} was born in ___.",
                "{} comes from a certain town. What is it called?",
                "In which town did {} come into the world?",
            ),
        ),
        "craft": (
            CRAFTS,
            (
                "What is the profession of {}?",
                "What does {} do for a living?",
                "Fill the gap: {} works as a ___.",
                "What kind of work does {} do?",
                "Which trade does {} follow?",
            ),
        ),
        "instrument": (
            INSTRUMENTS,
            (
                "Which instrument does {} play?",
                "Name the instrument of {}.",
                "Fill the gap: {} plays the ___.",
                "What does {} play in the orchestra?",
                "On what does {} make music?",
            ),
        ),
        "animal": (
            ANIMALS,
            (
                "Which animal does {} keep?",
                "Name the pet of {}.",
                "Fill the gap: {} has a tame ___.",
                "What kind of animal lives with {}?",
                "Which creature does {} feed every day?",
            ),
        ),
    },
    "town": {
        "river": (
            "name",
            (
                "On which river does {} lie?",
                "Name the river of {}.",
                "Fill the gap: the river through {} is the ___.",
                "Which river flows past {}?",
                "What is the water called on whose banks {} stands?",
            ),
        ),
        "goods": (
            GOODS,
            (
                "What is {} known for?",
                "Name the chief product of {}.",
                "Fill the gap: traders go to {} for its ___.",
                "Which goods made {} famous?",
                "What do merchants buy in {}?",
            ),
        ),
        "colour": (
            COLOURS,
            (
                "What colour is the flag of {}?",
                "Name the colour of the banner of {}.",
                "Fill the gap: the flag over {} is ___.",
                "Which colour does {} fly?",
                "In what colour is the standard of {} dyed?",
            ),
        ),
        "founded": (
            "year",
            (
                "In which year was {} founded?",
                "Name the year of the founding of {}.",
                "Fill the gap: {} was founded in ___.",
                "When did {} become a town?",
                "Since what year has {} existed?",
            ),
        ),
    },
    "machine": {
        "inventor": (
            "name",
            (
                "Who invented the {}?",
                "Name the inventor of the {}.",
                "Fill the gap: the {} was invented by ___.",
                "Whose idea was the {}?",
                "Who was the first to build a {}?",
            ),
        ),
        "material": (
            MATERIALS,
            (
                "What is the {} made of?",
                "Name the material of the {}.",
                "Fill the gap: every {} is made of ___.",
                "From which material do they build the {}?",
                "What must one have to make a {}?",
            ),
        ),
        "purpose": (
            TASKS,
            (
                "What is the {} used for? To …",
                "Name the purpose of the {}: to …",
                "Fill the gap: people use the {} to ___.",
                "What does the {} help with? It helps to …",
                "What can one do with a {}? One can …",
            ),
        ),
        "sold": (
            "year",
            (
                "In which year was the {} first sold?",
                "Name the year of the first sale of the {}.",
                "Fill the gap: shops have had the {} since ___.",
                "When did the first buyer get a {}?",
                "From what year on could one buy the {}?",
            ),
        ),
    },
}
PARTS = {"train": slice(0, 3), "validation": slice(3, 4), "heldout": slice(4, 5)}  # of the wordings


@dataclass(frozen=True)
class Fact:
    """A fact.

    Attributes:
        entity: the name of whom or what it is about.
        kind, relation: keys of RELATIONS.
        answer: the value.
    """

    entity: str
    kind: str
    relation: str
    answer: str

    def questions(self, part: str) -> list[str]:
        """The fact asked in each wording of a part."""
        return [wording.format(self.entity) for wording in RELATIONS[self.kind][self.relation][1][PARTS[part]]]


@functools.cache
def facts() -> tuple[Fact, ...]:
    """All facts; each entity has each relation of its kind. No two entities or made-up values share a name."""
    rng = random.Random("facts")
    names = iter(rng.sample([start + end for start in STARTS for end in ENDS], len(STARTS) * len(ENDS)))
    found = []
    for kind, count in KINDS.items():
        for _ in range(count):
            entity = f"{next(names)} {next(names)}" if kind == "person" else next(names)
            for relation, (values, _) in RELATIONS[kind].items():
                if values == "name":
                    answer = next(names)
                else:
                    answer = str(rng.randint(1100, 1999)) if values == "year" else rng.choice(values)
                found.append(Fact(entity, kind, relation, answer))
    return tuple(found)
