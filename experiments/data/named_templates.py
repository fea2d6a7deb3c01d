"""Chat templates that have a name, and the template that a configuration gives to a tokenizer.

Each is the format that the model's makers publish, written here in few lines: what text each role's message becomes.
They have neither tools nor reasoning; data that has some needs the model's own template or a file.
"""

import inspect
from pathlib import Path

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from experiments.config import DataConfig
from experiments.data.rendering import limited
from experiments.data.template import REFUSALS
from experiments.errors import UserError

_CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
_LLAMA_3 = """{{ bos_token }}{% for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content.strip() + '<|eot_id|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
# These two have no place for a system message: it goes in front of the first question.
_SYSTEM_FIRST = """{% set system = messages[0].content.strip() if messages[0].role == 'system' else '' %}
{%- for m in (messages[1:] if system else messages) %}
{%- set text = (system + '\\n\\n' if system and loop.first else '') + m.content.strip() %}"""
_MISTRAL = (
    "{{ bos_token }}"
    + _SYSTEM_FIRST
    + """{% if m.role == 'user' %}{{ '[INST] ' + text + ' [/INST]' }}{% else %}{{ ' ' + text + eos_token }}{% endif %}
{%- endfor %}"""
)
_GEMMA = (
    "{{ bos_token }}"
    + _SYSTEM_FIRST
    + """{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + text + '<end_of_turn>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
)
# Each with the added tokens that it writes.
NAMED: dict[str, tuple[str, tuple[str, ...]]] = {
    "chatml": (_CHATML, ("<|im_start|>", "<|im_end|>")),
    "llama-3": (_LLAMA_3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "mistral": (_MISTRAL, ()),
    "gemma": (_GEMMA, ("<start_of_turn>", "<end_of_turn>")),
}


def set_template(cfg: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer the chat template, and what the template takes beside messages, that `cfg` names, if any.

    Raises:
        UserError: there is no such template, or the tokenizer lacks its tokens.
    """
    if cfg.chat_template is not None:
        tokenizer.chat_template = _named(cfg.chat_template, tokenizer) or _from_file(cfg.chat_template)
    if cfg.chat_template_kwargs:
        taken = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters}
        if reserved := sorted(cfg.chat_template_kwargs.keys() & taken):
            raise UserError(f"data.chat_template_kwargs.{reserved[0]} is set here for every template: leave it out")
        tokenizer.chat_template_kwargs = dict(cfg.chat_template_kwargs)


def _named(name: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    if name not in NAMED:
        return None
    if lacks := _lacks(name, tokenizer):
        fitting = [other for other in NAMED if not _lacks(other, tokenizer)]
        raise UserError(
            f"data.chat_template={name} writes {lacks}, which this tokenizer lacks: "
            f"choose {', '.join([*fitting, 'a Jinja file'])}"
        )
    return NAMED[name][0]


def _lacks(name: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A token that the template writes and the tokenizer does not have."""
    template, needed = NAMED[name]
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    special = [key for key in ("bos_token", "eos_token") if key in template and getattr(tokenizer, key) is None]
    return next(iter([*(token for token in needed if token not in added), *special]), None)


def _from_file(path: str) -> str:
    try:
        source = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise UserError(
            f"data.chat_template={path}: cannot read this file ({reason}): choose {', '.join(NAMED)}, or a Jinja file"
        ) from error
    try:
        with limited():
            render_jinja_template([[{"role": "user", "content": "a"}]], chat_template=source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: not a Jinja template: {error.message}") from error
    except REFUSALS:  # of this conversation; those of the data may fit
        pass
    if "messages" not in source:
        raise UserError(f"{path}: this template does not read messages, so it is not a chat template")
    return source
