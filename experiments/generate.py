"""Let the model of a finished run write.

    python -m experiments.generate run=outputs/mine prompt="What is NF4?"    an answer, as it is written
    python -m experiments.generate run=outputs/mine prompt=… prompt=…        several answers, in batches
    python -m experiments.generate run=outputs/mine                          a conversation

run=DIR               a run's directory, or one of its checkpoints'
prompt=TEXT           may be given several times; prompts=FILE has one a line
system=TEXT           the system message; unless set, the one that the run was trained with, on docstrings or arithmetic
chat=false            continue the text as it is, without the chat template; so unless set after training on data=text
max_new_tokens=256    the longest answer
temperature=0         0: always the likeliest token; above, tokens are drawn: top_p=1 top_k=0 (all) seed=0, and other
                      settings of the model's generation_config.json, which are printed, such as repetition_penalty
batch_size=16         so many prompts at once; in fp32 each is answered as it is alone, in bf16 a batch rounds otherwise
                      and of two tokens that close the other one may win
merge=false           keep NF4 codes and adapters: less memory, slower; otherwise they become dense weights
trainer.…             device, dtype and threads, as in a run

Answers go to stdout, tokens a second to stderr. In a conversation, a line of three double quotes begins and ends a
message of several lines, /new begins another conversation, /help shows this, Ctrl-C stops an answer, Ctrl-D ends all.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from experiments.config import Config
from experiments.data.chat import Message
from experiments.data.opened import read_text
from experiments.data.sources import TASKS
from experiments.data.template import chat_template
from experiments.data.tokens import begin_and_end, tokenize
from experiments.errors import UserError
from experiments.models.generation import (
    Kept,
    decode,
    decodes_in_place,
    generate,
    own_settings,
    without_reasoning,
)
from experiments.models.sampling import Generated, Sampling
from experiments.runs.finished import FinishedRun, load_run
from experiments.system import machine
from experiments.system.cli import command, read_options
from modules.adapters.prefix import virtual_tokens

QUOTES = '"""'  # around a message of several lines
COMMANDS = (
    f"/new begins another conversation; a line of {QUOTES} begins and ends a message of several lines; "
    "Ctrl-C stops an answer; Ctrl-D ends it all"
)


@dataclass
class Options:
    run: str
    prompt: list[str] = field(default_factory=list)
    prompts: str | None = None
    system: str | None = None
    chat: bool | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    batch_size: int = 16
    merge: bool = True


class Writer:
    """Turns messages or text into tokens as the run's data did, and lets its model continue them."""

    def __init__(self, run: FinishedRun, options: Options):
        self.model, self.tokenizer, cfg = run.model, run.tokenizer, run.cfg
        self.chat = cfg.data.source != "text" if options.chat is None else options.chat
        if self.chat and not self.tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template: set chat=false to continue the text as it is")
        self.template = chat_template(self.tokenizer) if self.chat else None
        if not self.chat and options.system:
            raise UserError("system=… is part of a chat template, which chat=false leaves out")
        self.system = _system(cfg) if options.system is None else options.system
        self.sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, options.top_k)
        self.kept = Kept()
        torch.manual_seed(options.seed)

    def opening(self) -> list[Message]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt."""
        if self.chat:
            return self.encode_messages([*self.opening(), {"role": "user", "content": text}])
        begin, _ = begin_and_end(self.tokenizer)  # as the tokenizer begins a text: with BOS, or with nothing
        return self._checked(begin if text else [], text)

    def encode_messages(self, messages: list[Message]) -> list[int]:
        """The tokens of a conversation, up to where the assistant's turn begins."""
        try:
            return self._checked([], self.template.generation_prompt(messages))
        except ValueError as error:
            raise UserError(str(error)) from error

    def _checked(self, begin: list[int], text: str) -> list[int]:
        try:
            ids = begin + tokenize(self.tokenizer, text)["input_ids"]
        except ValueError as error:
            raise UserError(f"the prompt: {error}") from error
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", 0)
        longest -= sum(virtual_tokens(self.model)) if longest else 0
        if not ids:
            raise UserError("an empty prompt: give it some text to continue")
        if longest and len(ids) + self.sampling.max_new_tokens > longest:
            raise UserError(
                f"{len(ids)} tokens of prompt and max_new_tokens={self.sampling.max_new_tokens} are more than the "
                f"{longest} that the model can have"
            )
        return ids

    def write(self, prompts: list[list[int]], stream: bool = False, prompt_length: int | None = None) -> Generated:
        """The answers to prompts, see `generate`. A text that is continued has no prompt."""
        prompt_length = prompt_length if self.chat else 0
        return generate(self.model, self.tokenizer, prompts, self.sampling, stream, self.kept, prompt_length)


def _system(cfg: Config) -> str | None:
    return TASKS.get(cfg.data.source)


def answer_all(writer: Writer, prompts: list[str], batch_size: int) -> None:
    """Print the answers in the order of the prompts; those of similar length are written together."""
    ids = [writer.encode(prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(ids[i]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    answers, done = {}, []
    for batch in tqdm(batches, desc="writing", leave=False, disable=not sys.stderr.isatty()):
        done.append(writer.write([ids[i] for i in batch]))
        answers |= {i: decode(writer.tokenizer, new) for i, new in zip(batch, done[-1].ids)}
    for i, prompt in enumerate(prompts):
        print(f"[{i + 1}] {' '.join(prompt.split())[:100]}\n{answers[i].strip()}\n")
    print(Generated.sum(done).speed(), file=sys.stderr)


def converse(writer: Writer) -> None:
    """Answer each message that is typed. Keys and values of the turns so far are kept, if the model is decoded here."""
    if not writer.chat:
        raise UserError("a conversation needs the chat template: give prompt=… to continue a text")
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  input() edits lines and knows earlier ones

        print(f"system: {writer.system}" if writer.system else "no system message", file=sys.stderr)
        print("/help shows the commands", file=sys.stderr)
    messages, prompt_length = writer.opening(), None
    while (text := _read_message(interactive)) is not None:
        if text.strip() == "/new":
            messages, prompt_length = writer.opening(), None
            continue
        if text.strip() == "/help":
            print(COMMANDS, file=sys.stderr)
            continue
        if not text.strip():
            continue
        messages.append({"role": "user", "content": text})
        ids = writer.encode_messages(messages)
        prompt_length = prompt_length or len(ids)  # the first message's
        try:
            generated = writer.write([ids], stream=True, prompt_length=prompt_length)
        except KeyboardInterrupt as stop:
            if getattr(stop, "exit_code", 130) != 130:  # SIGTERM and SIGHUP end the conversation, Ctrl-C an answer
                raise
            print("\n(stopped)", file=sys.stderr)
            messages.pop()
            continue
        [new] = generated.ids
        said = decode(writer.tokenizer, without_reasoning(writer.tokenizer, new))  # as templates have earlier turns
        messages.append({"role": "assistant", "content": said})
        print(generated.speed(), file=sys.stderr)


def _read_message(interactive: bool) -> str | None:
    """The next message from stdin; None at its end."""
    try:
        line = input("> " if interactive else "")
        if line.strip() != QUOTES:
            return line
        lines = []
        while (line := input(". " if interactive else "")).strip() != QUOTES:
            lines.append(line)
        return "\n".join(lines)
    except EOFError:
        return None


@command
def main() -> None:
    options, changes = read_options(Options, __file__, changes=("trainer.",))
    Sampling(options.max_new_tokens, options.temperature, options.top_p, options.top_k).check()
    if options.batch_size < 1:
        raise UserError(f"batch_size={options.batch_size}: choose 1 or more")
    prompts = list(options.prompt)
    if options.prompts:
        prompts += [line for line in read_text(options.prompts).splitlines() if line.strip()]
    run = load_run(Path(options.run), changes, options.merge)
    print(machine.describe(run.model.device, run.dtype), file=sys.stderr)
    writer = Writer(run, options)
    if options.temperature and (own := own_settings(run.model)):
        print("from the model's generation_config.json:", *(f"{k}={v}" for k, v in own.items()), file=sys.stderr)
    if not decodes_in_place(run.model, writer.sampling):
        print("transformers' own loop writes this: slower, see experiments/README.md", file=sys.stderr)
    if not prompts:
        converse(writer)
    elif len(prompts) == 1:
        print(writer.write([writer.encode(prompts[0])], stream=True).speed(), file=sys.stderr)
    else:
        answer_all(writer, prompts, options.batch_size)


if __name__ == "__main__":
    main()
