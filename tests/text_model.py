"""A tokenizer for the tiny random models, so that what they generate is text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

VOCABULARY = 128  # the tiny models'
END = 2
PAIRS = [
    '{"',
    '":',
    '",',
    '"}',
    "[]",
    "[{",
    "},",
    "true",
    "false",
    "null",
    "ers",
    "ing",
    "00",
    "10",
    "\\n",
    "\\u",
]
# Tools are rendered and calls written as Hermes does, in few characters.
TEMPLATE = """{% if tools %}{% for tool in tools %}{{ tool.function.name }}
{% endfor %}<tool_call>
{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}{% for call in m.tool_calls or [] %}
<tool_call>
{{ {"name": call.function.name, "arguments": call.function.arguments} | tojson }}
</tool_call>{% endfor %}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
CONTEXT = 2048  # tokens; a character is about one


def write_tokenizer(file: Path, added: tuple[str, ...] = ()) -> None:
    """Printable ASCII, a new line and a tab, some tokens of several characters, and `added` ones beyond it."""
    stand_in = dict(zip("\n\t ", "ĊĉĠ", strict=True))  # of GPT-2's byte alphabet
    letters = [stand_in.get(c, c) for c in ["\n", "\t", *map(chr, range(32, 127))]]
    tokens, merges = ["<pad>", "<s>", "</s>", *letters], []
    for text in PAIRS:
        for size in range(2, len(text) + 1):
            if text[:size] not in tokens and len(tokens) < VOCABULARY - 2:
                tokens.append(text[:size])
                merges.append((text[: size - 1], text[size - 1]))
    tokens += [f"<unused{index}>" for index in range(VOCABULARY - len(tokens))]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [t for t in tokens if t.startswith("<") and len(t) > 2]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    tokenizer.save(str(file))


def make_text_model(model: Path, folder: Path) -> Path:
    """A copy of a tiny model with a tokenizer, a chat template and a longer context."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    write_tokenizer(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder
