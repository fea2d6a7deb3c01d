"""Chat templates that behave as published ones do, in a few lines each, and tokenizers of bytes for them."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# A think block in the turns behind the last user message only.
QWEN3 = """{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}
{%- set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.index0 > ns.last %}
{{- '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# Behind the last turn the tokenizer's EOS, which nobody writes in a conversation.
PHI3 = """{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""
# A last turn ends by another token than earlier ones; a channel before the answer.
GPT_OSS = """{% for m in messages %}{% if m.role == 'assistant' %}{% if loop.last and m.thinking %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}
{%- else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""
# The generation prompt opens a think block that turns do not have; thoughts in the content are dropped.
DEEPSEEK = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}{% else %}
{{- '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"""
# A turn has no end but the next role.
GLM4_MOE = """{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
LLAMA3 = """{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim
+ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
GEMMA = """{{ bos_token }}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}
{{- '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
# Nothing ends a turn.
PLAIN = """{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"""
# Content is a list of parts.
IMAGE_TEXT = """{% for m in messages %}{{ m.role + ': ' }}{% for part in m.content %}{{ part.text }}{% endfor %}
{{- '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""
# Marks, and an end token that may swallow the newline behind it.
MARKED = """{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>\n' + m.content + '<|end|>\n<|assistant|>\n' }}
{%- else %}{% generation %}{{ m.content + '<|end|>\n' }}{% endgeneration %}{% endif %}{% endfor %}"""

NAMES = (
    "<|im_start|>",
    "<|im_end|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|endoftext|>",
    "<|start|>",
    "<|return|>",
)
NAMES += ("<|channel|>", "<|message|>", "<|User|>", "<|Assistant|>", "<|start_header_id|>", "<|end_header_id|>")
NAMES += ("<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<think>", "</think>", "<s>")


def tokenizer(template: str | None, eos: str = "<|endoftext|>", rstrip: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte, and the special tokens of all templates; with `rstrip` they swallow blanks behind them."""
    raw = Tokenizer(models.BPE({char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(name, special=True, normalized=False, rstrip=rstrip) for name in NAMES])
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=eos, pad_token="<|endoftext|>", bos_token="<s>")
    fast.chat_template = template
    return fast
