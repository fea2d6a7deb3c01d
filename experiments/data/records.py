"""Format: an order in a sentence becomes JSON with fixed keys and types.

Orders are generated, always the same ones. Training, validation and held-out orders share wordings and no value: no
customer, town or article, no quantity, price or date.

    Ola Marsh from Riga orders forty-two lamps at 24 euros 50 each for 4 May 2031, express.
    {"customer": "Ola Marsh", "town": "Riga", "article": "lamp", "quantity": 42, "price": 24.5, "date": "2031-05-04",
     "express": true}
"""

import functools
import json
import random
from dataclasses import dataclass
from typing import Any

TASK = "Write the order as JSON with the keys customer, town, article, quantity, price, date and express."
STRINGS = dict.fromkeys(("customer", "town", "article"), str)
TYPES = STRINGS | {"quantity": int, "price": float, "date": str, "express": bool}
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
    "{customer} from {town} orders {quantity} {articles} at {price} each for {date}{express}.",
    "Please send {quantity} {articles} to {customer} in {town} by {date}, {price} apiece{express}.",
    "{town}, {date}: {customer} would like {quantity} {articles}. The price is {price} each{express}.",
    "An order of {quantity} {articles} for {date}, {price} each, came from {customer}, who lives in {town}{express}.",
)
NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October")
MONTHS += ("November", "December")
DATES = tuple(
    f"{year}-{month:02}-{day:02}" for year in range(2026, 2036) for month in range(1, 13) for day in range(1, 29)
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
        "date": own(DATES),
    }


def _in_words(order: dict[str, Any]) -> dict[str, str]:
    """The values of an order but `express` as a sentence has them."""
    year, month, day = map(int, order["date"].split("-"))
    tens, unit = divmod(order["quantity"], 10)
    quantity = NUMBERS[order["quantity"]] if tens < 2 else "-".join([TENS[tens], *([NUMBERS[unit]] if unit else [])])
    euros, cents = divmod(round(100 * order["price"]), 100)
    return {
        **{"customer": order["customer"], "town": order["town"], "articles": f"{order['article']}s"},
        **{"quantity": quantity, "price": f"{euros} euros {cents:02}", "date": f"{day} {MONTHS[month - 1]} {year}"},
    }


@functools.cache
def records(part: str) -> tuple[Record, ...]:
    """The records of train, validation or heldout, no two with the same sentence."""
    rng, values = random.Random(f"records, {part}"), values_of(part)
    found: dict[str, Record] = {}
    while len(found) < SIZES[part]:
        order = {key: rng.choice(own) for key, own in values.items()} | {"express": rng.random() < 0.5}
        sentence = rng.choice(WORDINGS).format(**_in_words(order), express=rng.choice(EXPRESS[order["express"]]))
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
