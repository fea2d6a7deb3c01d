"""Which column runs an op, what an op promises to torch, and that the cells are where columns.py looks for them."""

import ast
import importlib
import inspect
import re
import warnings
from pathlib import Path

import pytest
import torch

import kernels
from kernels import (
    columns,
    dequantize_4bit,
    has_kernel,
    joined_linears,
    lora_linear,
    quantize_4bit,
    use_backend,
    weight,
)
from kernels.adamw import _adamw
from kernels.attention import _attention
from kernels.joined import Joined, _joined_linears
from kernels.lora import _lora_linear
from kernels.nf4 import _dequantize_4bit, _quantize_4bit
from kernels.op import Op, define_op
from kernels.weight import Weight
from tests.kernels.linear_cases import make_base, randn
from tests.kernels.nf4_cases import needs_triton

ROOT = Path(kernels.__file__).parent
FILES = sorted(path.stem for path in (ROOT / "reference").glob("[!_]*.py"))


class Gpu:
    """Looks like a tensor on a GPU."""

    is_cuda, is_cpu, is_meta, device = True, False, False, torch.device("cuda", 0)


GPU, CPU = Gpu(), torch.zeros(64)
PACKED = Weight(*quantize_4bit(torch.ones(4, 64)))


@pytest.fixture(autouse=True)
def no_choice(monkeypatch):
    """The environment does not choose a column, and no warning has been given yet."""
    monkeypatch.delenv("QDORA_BACKEND", raising=False)
    remembered = (columns._environment, columns._has_matrix_instructions, columns._warn_of_reference)
    for function in remembered:
        function.cache_clear()
    yield
    for function in remembered:
        function.cache_clear()


@pytest.fixture
def card(monkeypatch):
    """Pretends that GPU is on a card of the given compute capability."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some card")

    def pretend(*capability: int):
        columns._has_matrix_instructions.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return pretend


# ------------------------------------------------------------------------------ the grid


def test_the_grid_of_the_readme_is_that_of_the_files():
    folder = Path(kernels.__file__).parent
    lines = (folder / "README.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if re.match(r"\| `\w+\.py` \|", line)]
    rows = [(row[0].strip("`").removesuffix(".py"), *row[1:]) for row in table if len(row) == 2 + len(columns.BACKENDS)]
    ops = {name: row.file for name, row in columns._rows.items() if (folder / f"{row.file}.py").is_file()}
    assert {file for file, *_ in rows} == set(ops.values())
    for file, named, *cells in rows:
        own = {name for name in ops if ops[name] == file and not name.endswith("_backward")}
        assert set(re.findall(r"`(\w+)`", named)) == own, file
        for column, cell in zip(columns.BACKENDS, cells, strict=True):
            said = own if cell in ("yes", "both", "all") else set(re.findall(r"`(\w+)`", cell))
            if column != "cpu" or kernels.cpu.available():
                assert {name for name in own if columns.find_function(column, file, name)} == said, (file, column)


# ------------------------------------------------------------------------------ which column runs


def test_by_device(card, recwarn):
    card(8, 0)
    assert _lora_linear.column(GPU) == _quantize_4bit.column(GPU) == "triton"
    assert _lora_linear.column(CPU) == _quantize_4bit.column(CPU, 64, "nf4") == "cpu"
    assert _joined_linears.column(GPU) == "triton"
    assert _attention.column(GPU) == "reference"  # which has no Triton cell
    assert _adamw.column([CPU]) == "reference"  # which has no cpu cell
    assert not recwarn


def test_a_cpu_kernel_runs_what_it_supports():
    assert _quantize_4bit.column(torch.zeros(63), 64, "nf4") == "reference"
    assert _quantize_4bit.column(CPU.half(), 64, "nf4") == "reference"
    assert _dequantize_4bit.column(Weight(*quantize_4bit(CPU, quant_type="fp4")), torch.float16) == "reference"


def test_the_cpu_kernels_can_be_missing(monkeypatch):
    monkeypatch.setattr(kernels.cpu, "available", lambda: False)
    monkeypatch.setattr(_lora_linear, "_cells", {})
    assert _lora_linear.cell("cpu") is None
    assert _lora_linear.column(CPU) == "reference"


def test_products_on_an_old_card_run_in_torch_and_say_so_once(card, recwarn):
    card(7, 5)
    assert _quantize_4bit.column(GPU) == "triton"
    assert not recwarn
    assert _lora_linear.column(GPU) == _lora_linear.column(GPU) == "reference"
    assert [str(w.message)[:18] for w in recwarn] == ["Some card is sm_75"]
    with use_backend("triton"):
        assert _lora_linear.column(GPU) == "triton"


@pytest.mark.parametrize("name, column", [("reference", "reference"), ("torch", "reference"), ("cpu", "cpu")])
def test_an_override_and_the_environment(name, column, monkeypatch):
    with use_backend(name):
        assert _lora_linear.column(CPU) == column
        with use_backend("cpu"):
            assert _lora_linear.column(CPU) == "cpu"
        assert _lora_linear.column(CPU) == column
    monkeypatch.setenv("QDORA_BACKEND", name)
    columns._environment.cache_clear()
    assert _lora_linear.column(CPU) == column
    with use_backend("reference"):
        assert _lora_linear.column(CPU) == "reference"


@needs_triton
def test_the_interpreter_runs_the_triton_column_on_a_cpu(monkeypatch):
    monkeypatch.setattr(columns, "interpreting", lambda: True)
    with use_backend("triton"):
        assert _lora_linear.column(CPU) == "triton"
    assert _lora_linear.column(CPU) == "cpu"


def test_a_missing_kernel_that_was_asked_for_is_said_once(monkeypatch):
    monkeypatch.setattr(columns, "interpreting", lambda: True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with use_backend("triton"):
            assert _attention.column(CPU) == _attention.column(CPU) == "reference"
        with use_backend("cpu"):
            assert _adamw.column([CPU]) == "reference"
    assert [str(w.message).split(":")[0] for w in said] == [
        "backend 'triton' was asked for, but attention has no kernel there for these tensors",
        "backend 'cpu' was asked for, but adamw has no kernel there for these tensors",
    ]


def test_a_column_on_the_wrong_device_is_refused(monkeypatch):
    monkeypatch.setattr(columns, "interpreting", lambda: False)
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"'triton' .* on a cpu tensor: move it to a GPU, or"):
        _lora_linear.column(CPU)
    with use_backend("cpu"), pytest.raises(RuntimeError, match=r"'cpu' .* on a cuda tensor: move it to the CPU"):
        _lora_linear.column(GPU)


def test_unknown_backends_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="use_backend: unknown backend 'cuda'; choose one of reference, triton, cpu"):
        with use_backend("cuda"):
            pass
    monkeypatch.setenv("QDORA_BACKEND", "numpy")
    with pytest.raises(ValueError, match="QDORA_BACKEND: unknown backend 'numpy'"):
        _lora_linear.column(CPU)


@pytest.mark.parametrize("name", ["rms_norm", "rotary", "dequantize_absmax", "quantize_4bit", "attention"])
def test_has_kernel_asks_for_the_device_alone(name):
    """These take more arguments than the one tensor, and some support only some tensors."""
    for x in (CPU, CPU.double()):
        assert has_kernel(name, x)
        with use_backend("reference"):
            assert not has_kernel(name, x)
    assert torch.compile(lambda x: has_kernel(name, x), fullgraph=True, backend="eager")(CPU)


def test_has_kernel_of_a_missing_cell_device_and_name(card):
    card(8, 0)
    assert not has_kernel("adamw", CPU)
    assert has_kernel("joined_linears", GPU) and not has_kernel("attention", GPU)
    assert not has_kernel("rms_norm", torch.zeros(2, device="meta"))
    with use_backend("cpu"):
        assert has_kernel("rms_norm", torch.zeros(2, device="meta"))
    with pytest.raises(ValueError, match="has_kernel: no op is named 'norm'; choose one of adamw, "):
        has_kernel("norm", CPU)


# ----------------------------------------------------------------------------------------- the grid


def ops() -> list[Op]:
    """Every op of kernels/."""
    files = (importlib.import_module(f"kernels.{path.stem}") for path in sorted(ROOT.glob("[!_]*.py")))
    return [value for file in files for value in vars(file).values() if isinstance(value, Op)]


def test_every_op_has_its_reference_in_the_file_of_its_name():
    found = {(one.file, one.name) for one in ops()}
    assert {file for file, _ in found} == set(FILES)
    for one in ops():
        for column in columns.BACKENDS:
            cell = one.cell(column)
            if cell is None:
                assert column != "reference", f"{one.name} has no reference"
                continue
            assert cell is getattr(importlib.import_module(f"kernels.{column}.{one.file}"), one.name)
            assert tuple(inspect.signature(cell).parameters) == one.parameters, f"{one.name} in {column}"
            assert column != "cpu" or callable(cell.supports), f"{one.name}'s CPU kernel does not say what it supports"


@pytest.mark.parametrize("path", sorted(ROOT.glob("reference/*.py")), ids=lambda path: path.stem)
def test_the_reference_imports_no_other_column(path):
    """Nor the choice between columns: plain torch alone."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    forbidden = ("triton", "numba", "kernels.triton", "kernels.cpu", "kernels.op", "kernels.columns")
    assert not [name for name in imported if name in forbidden or name.startswith(forbidden[2:4])]


# --------------------------------------------------------------------------- an op, as torch sees it


@define_op
def _sum_of_products(x: torch.Tensor, weight: Weight, others: list[Weight], shift: float) -> torch.Tensor:
    return x.new_empty(())


def test_weights_travel_flat_and_come_back():
    dense, double = Weight(torch.ones(3, 5)), Weight(*quantize_4bit(torch.ones(7, 64), double_quant=True))
    args = (CPU, PACKED, [dense, double, PACKED], 2.0)
    flat = _sum_of_products.flatten(args)
    assert [type(part) for part in flat] == [torch.Tensor, list, str, list, str, float]
    x, one, others, shift = _sum_of_products.unflatten(flat)
    assert x is CPU and shift == 2.0
    assert weight.flatten(one) == weight.flatten(PACKED)
    for got, want in zip(others, (dense, double, PACKED), strict=True):
        assert weight.flatten(got) == weight.flatten(want)
        assert (got.shape, got.dtype, got.packed) == (want.shape, want.dtype, want.packed)


@pytest.mark.parametrize("blocksize, shape", [(32, ()), (64, (0,)), (4096, (2, 3, 4))], ids=str)
def test_a_weight_of_any_shape_travels(blocksize, shape):
    w = Weight(*quantize_4bit(torch.ones(shape, dtype=torch.float16), blocksize, True, "int4"))
    state = weight.unflatten(*weight.flatten(w)).quant_state
    for name in ("shape", "dtype", "blocksize", "quant_type"):
        assert getattr(state, name) == getattr(w.quant_state, name)


@pytest.mark.parametrize("kind", ["dense", "nf4", "nf4-double"])
def test_opcheck_takes_the_flat_arguments(kind):
    w = Weight(*make_base(kind, 48, 64, torch.float32)[:2])
    lora_A, lora_B = randn(4, 64, seed=3), randn(48, 4, seed=4)
    args = (randn(5, 64, seed=2), w, lora_A, lora_B, None, 1.5, 0.0, None)
    torch.library.opcheck(_lora_linear.dispatched, tuple(_lora_linear.flatten(args)))


def test_a_weight_works_on_the_meta_device_and_in_fake_tensors():
    w = torch.empty(48, 64, device="meta")
    packed, state = quantize_4bit(w, double_quant=True)
    assert dequantize_4bit(packed, state).shape == (48, 64)
    y = lora_linear(torch.empty(2, 5, 64, device="meta"), packed, w[:4], w[:, :4], 1.0, quant_state=state)
    assert y.shape == (2, 5, 48) and y.device.type == "meta"
    with torch._subclasses.FakeTensorMode():
        packed = Weight(*quantize_4bit(torch.empty(48, 64)))
        assert lora_linear(torch.empty(5, 64), packed, torch.empty(4, 64), torch.empty(48, 4), 1.0).shape == (5, 48)


@pytest.mark.parametrize("joined", [False, True], ids=["lora", "joined"])
def test_a_compiled_weight_is_an_argument_of_one_graph(joined):
    """A weight that is given to the compiled function, dense or packed, and one that is a part of it."""
    x, lora_A, lora_B = randn(5, 64, seed=2), randn(4, 64, seed=3), randn(48, 4, seed=4)
    packed = Weight(*make_base("nf4-double", 48, 64, torch.float32)[:2])

    def run(x, w):
        if joined:
            return joined_linears(x, [Joined(Weight(w), lora_A, lora_B, 1.5), Joined(packed, lora_A, lora_B, 0.5)])[1]
        return lora_linear(x, Weight(w), lora_A, lora_B, 1.5) + lora_linear(x, packed, lora_A, lora_B, 0.5)

    w = randn(48, 64, seed=1)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, w), run(x, w), rtol=0, atol=0)


# ---------------------------------------------------------------------------------------- gradients


@pytest.fixture
def doubling(monkeypatch):
    """An op of two tensors and a list, with gradients by name: y = Σ 2·aᵢ + b, and a part that has no gradient."""

    def reference(a: list[torch.Tensor], b: torch.Tensor, factor: float):
        return [factor * one + b for one in a], b.new_ones(2)

    monkeypatch.setattr(_doubled, "_cells", {"reference": reference, "cpu": None, "triton": None})
    return _doubled


@define_op
def _doubled(a: list[torch.Tensor], b: torch.Tensor, factor: float) -> tuple[list[torch.Tensor], torch.Tensor]:
    return [torch.empty_like(one) for one in a], b.new_empty(2)


NEEDS = []


def _backward(kept, needs, gradients, _):
    NEEDS.append((needs.a, needs.b, needs.factor))
    found = [torch.zeros_like(kept.b) if g is None else g for g in gradients]
    return {"a": [kept.factor * g for g in found], "b": sum(found)}


_doubled.differentiate(lambda inputs, results: {"b": inputs.b, "factor": inputs.factor}, _backward)


@pytest.mark.parametrize("dispatched", [False, True], ids=["directly", "through the dispatcher"])
def test_gradients_go_by_name_and_lists_stay_lists(doubling, dispatched):
    a, b = [torch.ones(3, requires_grad=True), torch.full((3,), 2.0)], torch.ones(3, requires_grad=True)
    NEEDS.clear()
    (first, second), rest = doubling.dispatched(a, b, 2.0) if dispatched else doubling(a, b, 2.0)
    assert first.tolist() == [3.0] * 3 and second.tolist() == [5.0] * 3 and not rest.requires_grad
    second.sum().backward()  # nobody uses the first
    assert a[0].grad.tolist() == [0.0] * 3 and a[1].grad is None and b.grad.tolist() == [1.0] * 3
    assert NEEDS == [(True, True, False)]


def test_without_a_gradient_nothing_is_kept(doubling):
    a, b = [torch.ones(3)], torch.ones(3)
    assert not doubling(a, b, 2.0)[0][0].requires_grad
    b.requires_grad_()
    with torch.no_grad():
        assert not doubling(a, b, 2.0)[0][0].requires_grad
    assert doubling(a, b, 2.0)[0][0].requires_grad


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("joined", [False, True], ids=["one weight", "a list"])
def test_a_weight_that_trains_is_refused_in_one_line(joined, compiled):
    w, lora_A, lora_B = randn(48, 64, seed=1).requires_grad_(), randn(4, 64, seed=3), randn(48, 4, seed=4)

    def run(x):
        if joined:
            return joined_linears(x, [Joined(Weight(w), lora_A, lora_B, 1.0)])
        return lora_linear(x, w, lora_A, lora_B, 1.0)

    name = "joined_linears" if joined else "lora_linear"
    if compiled:
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=rf"{name} gives no gradient for its weight: freeze it with requires_grad_"):
        run(randn(5, 64, seed=2))
    with torch.no_grad():
        run(randn(5, 64, seed=2))
