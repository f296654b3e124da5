"""Chat templates of ten families, and a tokenizer of one token per byte that has their control tokens.

Those that TRL ships are taken from there; the others are written here in the shape of their family.
"""

from importlib.resources import files
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def shipped(name: str) -> str:
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}[SYSTEM_PROMPT]{{ messages[0].content }}[/SYSTEM_PROMPT]"
    "{% endif %}{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]"
    "{% elif m.tool_calls %}[TOOL_CALLS]{{ m.tool_calls | tojson }}{{ eos_token }}"
    "{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
OLMO = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n{{ m.content }}{{ eos_token }}"
    "{% if not loop.last %}\n{% endif %}{% else %}<|{{ m.role }}|>\n{{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
GRANITE = (
    "{% if tools %}<|start_of_role|>tools<|end_of_role|>{{ tools | tojson }}<|end_of_text|>\n{% endif %}"
    "{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}"
    "{% if m.tool_calls %}<|tool_call|>{{ m.tool_calls | tojson }}{% endif %}<|end_of_text|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'tool' %}<｜tool▁output▁begin｜>{{ m.content }}<｜tool▁output▁end｜>"
    "{% elif m.tool_calls %}<｜Assistant｜><｜tool▁calls▁begin｜>{% for call in m.tool_calls %}"
    "{{ call.function.name + '\n' + call.function.arguments }}{% endfor %}<｜tool▁calls▁end｜>{{ eos_token }}"
    "{% else %}<｜Assistant｜>{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
"""As of V3: the arguments of a call are a text."""
PLAIN = (
    "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)

FAMILIES = {
    # name: template, EOS token of the (base) tokenizer, token that ends a turn, other control tokens, takes tools
    "chatml": (CHATML, "<|endoftext|>", "<|im_end|>", ["<|im_start|>"]),
    "llama-3": (
        shipped("llama3_1"), "<|end_of_text|>", "<|eot_id|>",
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|python_tag|>"],
    ),
    "gemma": (shipped("gemma3"), "<eos>", "<end_of_turn>", ["<bos>", "<start_of_turn>"]),
    "phi": (shipped("phi3"), "<|endoftext|>", "<|end|>", ["<|user|>", "<|system|>", "<|assistant|>"]),
    "mistral": (MISTRAL, "</s>", "</s>", ["<s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
                                         "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]",
                                         "[/AVAILABLE_TOOLS]"]),
    "qwen-3": (shipped("qwen3"), "<|endoftext|>", "<|im_end|>", ["<|im_start|>"]),
    "deepseek": (
        DEEPSEEK, "<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>",
        ["<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"],
    ),
    "olmo": (OLMO, "<|endoftext|>", "<|endoftext|>", []),
    "granite": (GRANITE, "<|end_of_text|>", "<|end_of_text|>", ["<|start_of_role|>", "<|end_of_role|>"]),
    "plain": (PLAIN, "<eos>", "<eos>", []),
}  # fmt: skip
"""Of each family its template, the EOS token, the token that ends a turn, and other special tokens."""
BOS = {"llama-3": "<|begin_of_text|>", "gemma": "<bos>", "mistral": "<s>", "deepseek": "<｜begin▁of▁sentence｜>"}
MARKS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
"""Tokens that are not special."""


def family_tokenizer(folder: Path, family: str) -> PreTrainedTokenizerFast:
    """Save and return the tokenizer of a family: one token per byte, and its control tokens."""
    template, eos, end, others = FAMILIES[family]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = list(dict.fromkeys([eos, end, *others]))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, bos_token=BOS.get(family), additional_special_tokens=special,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in MARKS])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer
