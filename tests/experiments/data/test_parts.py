"""Data in parts: made-up facts and records, which are disjoint by construction, and the validation part of any data."""

import datetime
import json
import re

import pytest

from experiments.config import resolve
from experiments.data import facts, records
from experiments.data.samples import load_data
from experiments.errors import UserError
from experiments.runs.identity import config_hash
from experiments.system.cli import composed
from tests.experiments.helpers import tiny

SMALL = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
NUMBERS = {word: number for number, word in enumerate(f"{SMALL} eighteen nineteen".split(), start=1)}
NUMBERS |= {word: 10 * n for n, word in enumerate(TENS.split(), start=2)}


def load(*overrides: str):
    return load_data(resolve(composed("+method=lora", *overrides)).data, tiny()[1])


def turns(part) -> list[tuple[str, str]]:
    """The question and the answer of each sample."""
    _, tokenizer = tiny()
    texts = (tokenizer.decode(example.prompt_ids) for example in part)
    return [(re.search(r"user\n(.*?)<", text, re.S)[1], example.reference) for text, example in zip(texts, part)]


def test_each_fact_that_is_asked_was_taught_in_other_words():
    """The question without the entity's name is the wording; entity, relation and answer make the fact."""
    entities = sorted({fact.entity for fact in facts.facts()}, key=len, reverse=True)
    assert len(entities) == sum(facts.KINDS.values()) and len(facts.facts()) == 240
    relation = {  # of each wording
        wording: (kind, name)
        for kind, relations in facts.RELATIONS.items()
        for name, (_, wordings) in relations.items()
        for wording in wordings
    }

    def read(part) -> tuple[set, set]:
        found = set()
        for question, answer in turns(part):
            [entity] = [entity for entity in entities if re.search(rf"\b{entity}\b", question)]
            wording = question.replace(entity, "{}")
            found.add((wording, (entity, relation[wording], answer)))
        return {wording for wording, _ in found}, {fact for _, fact in found}

    wordings, taught = read(load("data=facts").train)
    assert len(taught) == 240 == len({fact[:2] for fact in taught}), "one answer for each fact"
    for part in ("heldout", "validation"):
        data = load("data=facts", f"data.part={part}")
        asked_in, asked = read(data.heldout)
        assert len(data.heldout) == 240 and asked == taught and asked_in.isdisjoint(wordings)
        assert len(data.train) == 720
        wordings |= asked_in


def test_records_share_no_value_and_the_sentence_has_them_all():
    seen: dict[str, set] = {key: set() for key in records.TYPES}
    for part, size in records.SIZES.items():
        found = records.records(part)
        assert len({record.sentence for record in found}) == size
        for key in records.TYPES.keys() - {"express"}:
            own = {record.order[key] for record in found}
            assert seen[key].isdisjoint(own), key
            seen[key] |= own
        for record in found:
            assert json.loads(record.text) == record.order
            order, sentence = record.order, record.sentence
            assert all(order[key] in sentence for key in ("customer", "town", "article"))
            day = datetime.date.fromisoformat(order["date"])
            assert f"{day.day} {day:%B %Y}" in sentence
            assert f"{order['price']:.2f}".replace(".", " euros ") in sentence
            ten, _, unit = re.search(rf"(\S+) {order['article']}s\b", sentence)[1].partition("-")
            assert NUMBERS.get(ten, 0) + NUMBERS.get(unit, 0) == order["quantity"], record
            assert record.order["express"] == record.sentence.endswith(("express.", "express delivery."))
    held = turns(load("data=records", "data.max_heldout=null", "data.max_train=3").heldout)
    assert set(held) == {(record.sentence, record.text) for record in records.records("heldout")}


EXPRESS = '"express": true'
ORDER = f'"customer": "a", "town": "b", "article": "c", "quantity": 3, "price": 2.5, "date": "d", {EXPRESS}'


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        (f"{{{ORDER}}}", True),
        (f"{{{ORDER}}}\n", True),
        (f"{{{ORDER.replace('2.5', '2')}}}", True),
        ("{" + ", ".join(reversed(ORDER.split(", "))) + "}", True),
        (f"{{{ORDER}", False),
        (f"{{{ORDER}, {ORDER}}}", False),
        (f'{{{ORDER}, "more": 1}}', False),
        (f"{{{ORDER.replace(', ' + EXPRESS, '')}}}", False),
        (f"{{{ORDER.replace('true', '1')}}}", False),
        (f"{{{ORDER.replace('3', 'true')}}}", False),
        (f"{{{ORDER.replace('3', '3.0')}}}", False),
        (f"{{{ORDER.replace('2.5', 'NaN')}}}", False),
        (f"{{{ORDER.replace('2.5', 'true')}}}", False),
        ("[1]", False),
        ("[" * 100_000, False),
        ("", False),
    ],
)  # fmt: skip
def test_the_parser_asks_for_the_keys_and_their_types(text, valid):
    assert (records.parsed(text) is not None) == valid


def test_the_validation_part_is_neither_trained_nor_held_out(tmp_path):
    path = tmp_path / "chats.jsonl"
    rows = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["data=jsonl", f"data.path={path}"]
    final, choice = load(*given), load(*given, "data.part=validation")
    parts = [set(turns(part)) for part in (choice.train, choice.heldout, final.heldout)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 200
    assert set(turns(final.train)) == parts[0] | parts[1], "the final run trains on the validation part"
    assert 8 < len(parts[1]) < 32 and "validation samples" in choice.note
    # a held-out file is not even opened
    given += ["data.heldout_path=/not/there"]
    assert len(load(*given, "data.part=validation").heldout) == len(final.heldout)


def test_the_validation_part_of_text_comes_before_the_held_out_end(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"{n:03} " for n in range(510)))
    given = ["data=text", f"data.path={path}", "data.max_length=50"]
    final, choice = load(*given), load(*given, "data.part=validation")

    def text(part) -> str:
        return "".join(tiny()[1].decode(example.input_ids, skip_special_tokens=True) for example in part)

    assert text(choice.train) + text(choice.heldout) == text(final.train)
    assert text(final.train) + text(final.heldout) == path.read_text()
    assert len(text(choice.heldout)) == pytest.approx(len(text(final.heldout)), abs=2)


def test_bad_parts_and_hashes():
    with pytest.raises(UserError, match=r"data\.part=test is not one of heldout, validation"):
        load("data=arithmetic", "data.part=test")
    with pytest.raises(UserError, match=r"data=facts comes in parts of its own: leave data\.heldout_fraction out"):
        load("data=facts", "data.heldout_fraction=0.2")
    one, other = (resolve(composed("+method=qdora", "rank=16", *more)) for more in ([], ["data.part=validation"]))
    assert config_hash(one) == "d7dc3aa907b5" and config_hash(other) != config_hash(one)
