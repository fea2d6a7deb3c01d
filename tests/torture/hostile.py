"""Files from strangers: no code runs, no path leaves its directory, no number makes us take gigabytes.

Each case is read with 1.5 GB of memory beyond those in use and a limit of time, and with Python's audit events
watched. It ends in a result or in one line; anything else is a finding.
"""

import contextlib
import gzip
import json
import os
import resource
import shutil
import signal
import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save_file

from experiments.config import DataConfig
from experiments.data import rendering
from experiments.data.samples import load_data
from experiments.errors import UserError
from experiments.models.directory import load_directory
from experiments.models.gguf import gguf_as_directory
from experiments.report.__main__ import report
from experiments.runs.config_file import read_config
from modules import adapters, attach, detach, load_adapter, quantize, save_adapter
from modules.files.bitsandbytes import save_bnb4
from tests.experiments.helpers import tiny
from tests.experiments.made_up_results import write_run
from tests.torture.damage import flipped, longer, retyped, truncated, zeroed
from tests.torture.damaged import patched, quiet, shown, strip

ROOM, SECONDS = 3 * 2**29, 60
RUNS_CODE = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class", "socket.connect")
HUGE = (10**6, 2**31 - 1, 2**40, 2**62, -1, 0)
_seen: list[str] = []
_watching = False


def _watch(event: str, args: tuple) -> None:
    if _watching and event in RUNS_CODE:
        _seen.append(f"{event} {args}"[:200])


sys.addaudithook(_watch)


class TooLong(Exception):
    """A case took longer than SECONDS."""


@contextlib.contextmanager
def confined() -> Iterator[None]:
    """Inside, memory and time are limited, and events of RUNS_CODE are noted."""
    global _watching

    def late(number, frame):
        raise TooLong(f"longer than {SECONDS} s")

    before = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handler = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + ROOM, before[1]))
    signal.alarm(SECONDS)
    _watching = True
    try:
        yield
    finally:
        _watching = False
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, handler)


def judge(use: Callable[[], Any]) -> str | None:
    """What is wrong with reading a hostile file; None: it ended in a result or in one line."""
    _seen.clear()
    try:
        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            with confined():
                use()
    except (UserError, ValueError, OSError) as error:
        if "\n" in str(error):
            return f"more than one line: {error!r}"[:400]
    except Exception as error:
        return shown(error)
    return f"it ran code: {_seen}" if _seen else None


def campaign(count: int, folder: Path, seed: int = 0) -> list[str]:
    """Read all crafted files and `count` random ones; a line for each that was not refused or read well."""
    readers = _readers(folder)
    findings = []
    for name, use in _crafted(folder, readers):
        if found := judge(use):
            findings.append(f"hostile, {name}: {found}")
    findings += _html(folder / "report")
    names = sorted(readers)
    for number in range(count):
        rng, name = Random(f"{seed} {number}"), names[number % len(names)]
        whole, read = readers[name]
        directory = _copy(whole, folder)
        path = rng.choice([path for path in sorted(directory.rglob("*")) if path.is_file()])
        is_json = path.suffix == ".json"
        way = rng.choice(
            [_huge, retyped] if is_json and rng.random() < 0.7 else [truncated, flipped, zeroed, longer, _bytes]
        )
        content = path.read_bytes()
        path.write_bytes(way(content, content, rng))
        if found := judge(lambda: read(directory)):  # noqa: B023
            findings.append(f"hostile {number} ({name}, {path.name} {way.__name__}): {found}")
    return findings


def _copy(whole: Path, folder: Path) -> Path:
    target = folder / "hostile"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(whole, target)
    return target


def _huge(whole: bytes, other: bytes, rng: Random) -> bytes:
    """JSON with a number that is too large."""
    tree = json.loads(whole)
    numbers = list(_numbers(tree))
    if not numbers:
        return retyped(whole, other, rng)
    holder, key = rng.choice(numbers)
    holder[key] = rng.choice(HUGE)
    return json.dumps(tree).encode()


def _numbers(tree: Any) -> Iterator[tuple[Any, Any]]:
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if type(value) is int:
            yield tree, key
        elif isinstance(value, dict | list):
            yield from _numbers(value)


def _bytes(whole: bytes, other: bytes, rng: Random) -> bytes:
    """A few bytes that are all ones, as a length or a count would be."""
    start = rng.randrange(min(len(whole), 2000))
    length = rng.choice((1, 2, 4, 8))
    return whole[:start] + b"\xff" * length + whole[start + length :]


def _readers(folder: Path) -> dict[str, tuple[Path, Callable[[Path], Any]]]:
    """For each kind of file from elsewhere a directory with one, and what reads it."""
    made = {}
    for name in ("dense", "packed"):
        model, tokenizer = tiny()
        if name == "packed":
            quantize(model)
            save_bnb4(model, folder / name)
        else:
            model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        strip(folder / name)
        made[name] = folder / name, lambda path: load_directory(path, torch.float32)
    base, _ = tiny()
    model, _ = tiny()
    attach(model, "dora", rank=4)
    save_adapter(model, folder / "adapter")
    strip(folder / "adapter")

    def adapter(path: Path) -> None:
        try:
            load_adapter(base, path)
        finally:
            if adapters(base):
                detach(base)

    made["adapter"] = folder / "adapter", adapter
    (folder / "gguf").mkdir()
    from tests.experiments.models.test_gguf import llama, write

    write(folder / "gguf" / "model.gguf", llama())
    os.environ["QDORA_CACHE"] = str(folder / "cache")
    made["gguf"] = folder / "gguf", lambda path: gguf_as_directory(path / "model.gguf")
    (folder / "rows").mkdir()
    lines = [json.dumps({"prompt": f"What is {n}?", "completion": f"It is {n}."}) for n in range(40)]
    (folder / "rows" / "rows.jsonl").write_text("\n".join(lines))
    made["rows"] = folder / "rows", lambda path: _rows(path / "rows.jsonl")
    (folder / "array").mkdir()
    (folder / "array" / "rows.json").write_text(f"[{','.join(lines)}]")
    made["array"] = folder / "array", lambda path: _rows(path / "rows.json")
    (folder / "gzip").mkdir()
    (folder / "gzip" / "rows.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    made["gzip"] = folder / "gzip", lambda path: _rows(path / "rows.jsonl.gz")
    return made


def _rows(path: Path, template: str | None = None) -> None:
    _, tokenizer = tiny()
    load_data(DataConfig(name="jsonl", source="jsonl", path=str(path), chat_template=template), tokenizer)


def _crafted(folder: Path, readers: dict) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Attacks by name."""
    canary = folder / "canary"
    code = f"import pathlib\npathlib.Path({str(canary)!r}).touch()\n"

    def model(name: str, change: Callable[[Path], None]) -> tuple[str, Callable[[], None]]:
        def use() -> None:
            directory = _copy(readers["packed" if "packed" in name else "dense"][0], folder)
            change(directory)
            try:
                load_directory(directory, torch.float32)
            finally:
                assert not canary.exists(), "code of a model directory ran"

        return name, use

    def config(file: str, **values: Any) -> Callable[[Path], None]:
        def change(directory: Path) -> None:
            (directory / "evil.py").write_text(code)
            path = directory / file
            path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))

        return change

    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.T", "evil.T"]}
    yield model("code in config.json", config("config.json", auto_map=auto))
    yield model("code of an unknown model", config("config.json", auto_map=auto, model_type="evil"))
    yield model("code of a tokenizer", config("tokenizer_config.json", auto_map=auto, tokenizer_class="Evil"))
    for key, size in (("num_hidden_layers", 10**7), ("vocab_size", 2**33), ("hidden_size", 2**24)):
        yield model(f"{key} of {size}", config("config.json", **{key: size}))
        yield model(f"packed, {key} of {size}", config("config.json", **{key: size}))
    yield model("intermediate_size", config("config.json", intermediate_size=2**36))

    def pickled(directory: Path) -> None:
        (directory / "model.safetensors").unlink()
        (directory / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR.")

    yield model("a pickle", pickled)

    def outside(link: bool) -> Callable[[Path], None]:
        def change(directory: Path) -> None:
            shutil.move(directory / "model.safetensors", folder / "secret.safetensors")
            from safetensors import safe_open

            with safe_open(folder / "secret.safetensors", "pt") as file:
                names = list(file.keys())
            shard = str(folder / "secret.safetensors") if link else "../secret.safetensors"
            index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
            (directory / "model.safetensors.index.json").write_text(json.dumps(index))
            save_file({"x": torch.zeros(1)}, directory / "other.safetensors")

        return change

    def refused(made: tuple[str, Callable]) -> tuple[str, Callable]:
        name, use = made

        def must_fail() -> None:
            try:
                use()
            except (UserError, ValueError):
                return
            raise AssertionError("it was read")

        return name, must_fail

    for name in ("dense", "packed"):
        yield refused(model(f"{name}: ../ in an index", outside(False)))
        yield refused(model(f"{name}: / in an index", outside(True)))

    def header(length: int, text: bytes = b"{}") -> Callable[[Path], None]:
        return lambda directory: (
            (directory / "model.safetensors").write_bytes(struct.pack("<Q", length) + text) and None
        )

    for length in (2**63, 2**40, 10**8, 0):
        yield refused(model(f"a header of {length} bytes", header(length)))
    deep = b'{"a":' * 10**5 + b"1" + b"}" * 10**5
    yield refused(model("a deep header", header(len(deep), deep)))
    huge = b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}'
    yield refused(model("a shape that overflows", header(len(huge), huge)))

    def nested(path: Path) -> None:
        path.write_text("[" * 10**5 + "]" * 10**5)

    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        yield model(f"deep {name}", lambda directory, name=name: nested(directory / name))

    _, read = readers["adapter"]
    for key, value in (("r", 2**40), ("r", -1), ("lora_alpha", 1e400), ("target_modules", "(a+)+$"), ("r", "x")):

        def adapter(key: str = key, value: Any = value) -> None:
            directory = _copy(readers["adapter"][0], folder)
            path = directory / "adapter_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
            read(directory)

        yield f"adapter with {key}={value}", adapter

    def prompt_tuning() -> None:
        directory = _copy(readers["adapter"][0], folder)
        told = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2**40, "task_type": "CAUSAL_LM", "token_dim": 64}
        (directory / "adapter_config.json").write_text(json.dumps(told))
        read(directory)

    yield "prompt tuning of many tokens", prompt_tuning
    yield from _templates(folder)
    yield from _bombs(folder, readers)


def _templates(folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    attacks = {
        "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "globals": "{{ cycler.__init__.__globals__.os.system('true') }}",
        "a namespace": "{{ messages.__class__.__base__.__subclasses__() }}",
        "an include": "{% include '/etc/passwd' %}",
        "an import": "{% import 'os' as os %}{{ os.system('true') }}",
        "a range": "{% for i in range(999999999) %}x{% endfor %}",
        "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "a string": "{{ 'x' * 9999999999 }}",
        "a format": "{{ '%99999999999d' % 1 }}",
        "depth": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "syntax": "{{ " * 1000,
    }
    (folder / "chat.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 9)
    for name, source in attacks.items():
        path = folder / "template.jinja"

        def use(source: str = source, path: Path = path) -> None:
            path.write_text(source)
            with patched(rendering, "SECONDS", 1):
                _rows(folder / "chat.jsonl", str(path))

        yield f"a template with {name}", use


def _bombs(folder: Path, readers: dict) -> Iterator[tuple[str, Callable[[], Any]]]:
    for name, part in (("zeros", b"\0"), ("blanks", b" "), ("one line", b"x")):
        path = folder / f"{name.replace(' ', '-')}.jsonl.gz"
        path.write_bytes(gzip.compress(part * 2**20) * 2048)
        yield f"gzip of 2 GB of {name}", lambda path=path: _rows(path)
    lines = {
        "deep": "[" * 10**6,
        "deep object": '{"a":' * 10**5,
        "long number": '{"prompt": ' + "9" * 10**5 + "}",
        "infinity": '{"prompt": "a", "completion": 1e999}',
    }
    for name, line in lines.items():
        path = folder / f"{name}.jsonl".replace(" ", "-")
        path.write_text(line)
        yield f"{name} JSON", lambda path=path: _rows(path)
    run = folder / "strange-run"
    run.mkdir()
    laughs = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [{','.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(9)
    )
    for name, text in {
        "a tag": "seed: !!python/object/apply:os.system ['true']\n",
        "a new object": "model: !!python/object/new:os.system ['true']\n",
        "a call": "model: {_target_: os.system, command: 'true'}\n",
        "laughs": laughs,
        "depth": "seed: " + "[" * 10**5 + "\n",
    }.items():

        def config(text: str = text) -> None:
            (run / "config.yaml").write_text(text)
            read_config(run)

        yield f"config.yaml with {name}", config
    whole = (readers["gguf"][0] / "model.gguf").read_bytes()
    for name, at in (("tensors", 8), ("keys", 16)):
        for count in (2**63, 2**32, 10**6):

            def gguf(at: int = at, count: int = count) -> None:
                directory = _copy(readers["gguf"][0], folder)
                (directory / "model.gguf").write_bytes(whole[:at] + struct.pack("<Q", count) + whole[at + 8 :])
                gguf_as_directory(directory / "model.gguf")

            yield f"GGUF of {count} {name}", gguf


def _html(folder: Path) -> list[str]:
    """The report on results whose names hold HTML."""
    evil = "<script>alert(1)</script>"
    folder.mkdir()
    for seed, loss in enumerate([1.0, 1.1, 1.2]):
        write_run(folder, "lora", seed, loss, rank=4, model__name=evil, data__name=f"{evil}'\"&", commit=evil)
        write_run(folder, "dora", seed, loss - 0.1, rank=4, model__name=evil, data__name=f"{evil}'\"&", commit=evil)
    with quiet():
        directory, _, _ = report(folder)
    page = (directory / "report.html").read_text()
    return (
        []
        if "<script" not in page and "&lt;script" in page
        else ["hostile: HTML in names is not escaped in the report"]
    )
