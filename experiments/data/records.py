"""Format: an order in a sentence becomes JSON with fixed keys and types.

Orders are generated, always the same ones. Training, validation and held-out orders share wordings and no value: no
customer, town or article, no quantity and no price.

    Ola Marsh from Riga orders 3 lamps at 24.5 euros each, express.
    {"customer": "Ola Marsh", "town": "Riga", "article": "lamp", "quantity": 3, "price": 24.5, "express": true}
"""

import functools
import json
import random
from dataclasses import dataclass
from typing import Any

TASK = "Write the order as JSON with the keys customer, town, article, quantity, price and express."
TYPES = {"customer": str, "town": str, "article": str, "quantity": int, "price": float, "express": bool}
SIZES = {"train": 1200, "validation": 400, "heldout": 400}
SHARE = {"train": 4, "validation": 1, "heldout": 2}  # of seven values in turn

FIRST = (
    *(
        "Ada",
        "Bo",
        "Cleo",
        "Dov",
        "Eva",
        "Finn",
        "Gus",
        "Hedy",
        "Ida",
        "Jan",
        "Kai",
        "Lea",
        "Max",
        "Nora",
        "Ola",
        "Pia",
    ),
    *("Quin", "Rosa", "Sven", "Tilda", "Udo", "Vera", "Wim", "Xenia", "Yann", "Zoe", "Abel", "Bea"),
)
LAST = (
    *("Abbot", "Barros", "Cole", "Dietz", "Eklund", "Farr", "Gomez", "Hale", "Ito", "Juhl", "Kern", "Lund", "Marsh"),
    *("Nunes", "Okafor", "Park", "Quist", "Reyes", "Silva", "Tanner", "Ueda", "Vogel", "Weiss", "Xu", "York"),
    *("Zander", "Amin", "Bloom"),
)
TOWNS = (
    *("Aarhus", "Bergen", "Cork", "Delft", "Essen", "Faro", "Ghent", "Haifa", "Izmir", "Jena", "Krakow", "Leeds"),
    *("Malmo", "Nantes", "Oslo", "Porto", "Quito", "Riga", "Siena", "Turin", "Ulm", "Vaduz", "Wells", "Xalapa"),
    *("York", "Zurich", "Arles", "Basel"),
)
ARTICLES = (
    *("apron", "basket", "candle", "drum", "easel", "fan", "globe", "hammer", "kettle", "lamp", "mirror", "notebook"),
    *("oven", "pillow", "quilt", "rug", "stool", "table", "umbrella", "vase", "whistle", "blanket", "clock", "ladder"),
    *("pan", "saw", "tent", "wallet"),
)
WORDINGS = (
    "{customer} from {town} orders {quantity} {articles} at {price} euros each{express}.",
    "Please send {quantity} {articles} to {customer} in {town}, {price} euros apiece{express}.",
    "{town}: {customer} would like {quantity} {articles}. The price is {price} euros each{express}.",
    "An order of {quantity} {articles} at {price} euros each came from {customer}, who lives in {town}{express}.",
)
EXPRESS = {True: (", express", ", by express delivery"), False: ("", ", no hurry", ", by normal post")}


@dataclass(frozen=True)
class Record:
    """A sentence and the order in it, by the keys of TYPES."""

    sentence: str
    order: dict[str, Any]

    @property
    def text(self) -> str:
        return json.dumps(self.order)


def values_of(part: str) -> dict[str, tuple]:
    """The values that the orders of a part may have, by key."""
    first, size = sum(SHARE[other] for other in list(SHARE)[: list(SHARE).index(part)]), sum(SHARE.values())

    def own(values: tuple) -> tuple:
        return tuple(value for place, value in enumerate(values) if first <= place % size < first + SHARE[part])

    return {
        "customer": tuple(f"{one} {other}" for one in own(FIRST) for other in own(LAST)),
        "town": own(TOWNS),
        "article": own(ARTICLES),
        "quantity": own(tuple(range(2, 100))),
        "price": own(tuple(tenths / 10 for tenths in range(11, 991))),
    }


@functools.cache
def records(part: str) -> tuple[Record, ...]:
    """The records of train, validation or heldout, no two with the same sentence."""
    rng, values = random.Random(f"records, {part}"), values_of(part)
    found: dict[str, Record] = {}
    while len(found) < SIZES[part]:
        order = {key: rng.choice(own) for key, own in values.items()} | {"express": rng.random() < 0.5}
        words = order | {"articles": f"{order['article']}s", "express": rng.choice(EXPRESS[order["express"]])}
        sentence = rng.choice(WORDINGS).format(**words)
        found.setdefault(sentence, Record(sentence, order))
    return tuple(found.values())


def parsed(text: str) -> dict[str, Any] | None:
    """The order that `text` is: a JSON object with exactly the keys of TYPES and their types, in any order and with any
    spaces; else None. A price may be a whole number, 24 for 24.0."""
    try:
        order = json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    if not isinstance(order, dict) or order.keys() != TYPES.keys():
        return None
    fits = all(type(order[key]) is kind or (kind is float and type(order[key]) is int) for key, kind in TYPES.items())
    return order if fits else None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key is there twice")
    return dict(pairs)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
