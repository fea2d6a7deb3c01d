"""Decoding with a static cache against a plain loop without any, over architectures; that a step never waits for the
device; conversations; too little memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from experiments.errors import UserError
from experiments.models import decoding, generation
from experiments.models.generation import Kept, generate
from experiments.models.sampling import Sampling
from experiments.system import memory
from tests.survey import life, small

PROMPTS = [list(range(3, 24)), [7, 9], list(range(40, 52))]
NO_ENDS = decoding.Ends((), 0)
WAITS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "unique", "masked_select"}


def plain(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
    return ids[len(prompt) :]


def rows_of(model: PreTrainedModel, temperature: float = 0) -> decoding.Rows:
    return decoding.Rows(model, 3, 64, decoding.chooser(temperature, top_p=0.9, top_k=7), NO_ENDS)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return small.build("llama")


@pytest.mark.parametrize(
    "model_type",
    ["llama", "gpt2", "bloom", "mistral", "gemma3_text", "gpt_oss", "qwen3_moe"],
)
def test_a_batch_is_the_plain_loop_over_each_prompt(model_type):
    model = small.build(model_type)  # windows have 8 tokens, which all rows outgrow
    assert decoding.bytes_per_column(model) > 0
    rows = rows_of(model)
    rows.read(PROMPTS)
    written = [list(row) for row in zip(*decoding.written(rows, 15))]
    assert written == [plain(model, prompt, 15) for prompt in PROMPTS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom", "gemma3_text"])
def test_rounding_is_not_taken_for_another_model(model_type, dtype):
    assert decoding.bytes_per_column(small.build(model_type).to(dtype)) > 0


@pytest.mark.parametrize("model_type", ["mamba", "qwen3_next", "bart", "xlnet"])
def test_other_models_take_transformers_loop(model_type):
    model, tokenizer = small.build(model_type), life.tokenizer()
    assert decoding.bytes_per_column(model) == 0
    [ids] = generate(model, tokenizer, [PROMPTS[0]], Sampling(4)).ids
    assert 1 <= len(ids) <= 4


@pytest.mark.parametrize("in_place", [True, False])
def test_the_head_is_one_product(llama, monkeypatch, in_place):
    """Of a view into all columns PyTorch makes a product a row on a CPU, with a copy of the head's weights for each."""
    monkeypatch.setattr(generation, "decodes_in_place", lambda *_: in_place)
    products = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm) and args[1].shape[-1] == vocabulary:
                products.append((op.overloadpacket.__name__, *args[0].shape))
            return op(*args, **kwargs or {})

    vocabulary, hidden = llama.lm_head.weight.shape
    monkeypatch.setattr(llama.lm_head.weight, "requires_grad", False)  # PyTorch does so with frozen weights alone
    decoding.bytes_per_column(llama)  # has products of its own, once
    with Watched():
        written = generate(llama, life.tokenizer(), PROMPTS, Sampling(2)).ids
    assert products and set(products) == {("mm", 3, hidden)}
    assert all(row == plain(llama, prompt, 2)[: len(row)] for row, prompt in zip(written, PROMPTS))


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "gpt2"])
def test_a_step_never_waits_for_the_device(model_type, temperature):
    class Refuses(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function.overloadpacket.__name__ not in WAITS, function
            return function(*args, **kwargs or {})

    rows = rows_of(small.build(model_type), temperature)
    rows.read(PROMPTS)
    places = [tensor.data_ptr() for tensor in (rows.tokens, rows.done, rows.positions, rows.cache.layers[0].keys)]
    with Refuses():
        rows.write()
        rows.write()
    assert places == [
        tensor.data_ptr() for tensor in (rows.tokens, rows.done, rows.positions, rows.cache.layers[0].keys)
    ]


def test_each_row_stops_at_its_own_end(llama):
    expected = [plain(llama, prompt, 12) for prompt in PROMPTS]
    stop = expected[0][3]
    rows = decoding.Rows(llama, 3, 64, decoding.chooser(0, 1, 0), decoding.Ends((stop,), 258))
    rows.read(PROMPTS)
    for row, whole in zip(zip(*decoding.written(rows, 12)), expected):
        end = whole.index(stop) + 1 if stop in whole else 12
        assert list(row[:end]) == whole[:end] and set(row[end:]) <= {258}
    rows.read([[*PROMPTS[0], *expected[0][:3]]] * 3)  # every row ends at once
    assert len(list(decoding.written(rows, 12))) == 1


def test_rows_serve_one_batch_after_another(llama):
    kept, tokenizer = Kept(), life.tokenizer()
    for prompts in (PROMPTS, [[5], [6, 7], list(range(30))], PROMPTS):
        alone = generate(llama, tokenizer, prompts, Sampling(9)).ids
        assert generate(llama, tokenizer, prompts, Sampling(9), kept=kept).ids == alone
        rows = kept.rows
    assert rows is kept.rows


def test_a_conversation_reads_only_what_is_new_and_outgrows_its_cache(llama):
    kept, tokenizer, ids = Kept(), life.tokenizer(), list(range(3, 40))
    for turn in range(4):
        found = generate(llama, tokenizer, [ids], Sampling(20), kept=kept)
        assert found.ids == generate(llama, tokenizer, [ids], Sampling(20)).ids
        assert turn == 0 or found.prompt_tokens <= 11  # ten new ones, and the last of the answer
        ids = [*ids, *found.ids[0], *range(50 + turn, 60 + turn)]
    assert kept.rows.length >= len(ids) > decoding.COLUMNS
    shorter = [*ids[:30], 99, 98]  # another turn was rendered: what differs is forgotten
    found = generate(llama, tokenizer, [shorter], Sampling(5), kept=kept)
    assert found.prompt_tokens == 2 and found.ids == [plain(llama, shorter, 5)]


def test_a_batch_that_does_not_fit_names_the_number_that_does(llama, monkeypatch):
    row = decoding.bytes_per_column(llama) * 64
    assert row == 2 * 2 * 2 * 16 * 4 * 64  # keys and values, layers, heads, their size, fp32, columns
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2 * row + 1)
    with pytest.raises(UserError, match=r"3 rows of 64 tokens take .* 2 rows fit"):
        generate(llama, life.tokenizer(), PROMPTS, Sampling(5))
    assert len(generate(llama, life.tokenizer(), PROMPTS[:2], Sampling(5)).ids) == 2


def test_own_settings_of_a_model_are_for_transformers_loop(llama, monkeypatch):
    assert generation.decodes_in_place(llama, Sampling(temperature=1.0))
    monkeypatch.setattr(llama.generation_config, "repetition_penalty", 1.3)
    assert generation.decodes_in_place(llama, Sampling())
    assert not generation.decodes_in_place(llama, Sampling(temperature=1.0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("model_type", ["llama", "mistral", "gpt_oss"])
def test_replayed_steps_are_the_steps(model_type):
    model = small.build(model_type).cuda()
    rows = rows_of(model)
    for _ in range(2):  # the second batch replays the first one's graph
        rows.read(PROMPTS)
        written = [list(row) for row in zip(*decoding.written(rows, 15))]
        assert rows.graphs.graphs
        model.cpu()
        assert written == [plain(model, prompt, 15) for prompt in PROMPTS]
        model.cuda()
