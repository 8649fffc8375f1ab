"""Llama 3.2 and 4: the answer is a list of calls in Python, `[f(a=1), g()]`, perhaps between special tokens."""

from __future__ import annotations

import ast
import json
from typing import Any

from veneer.server.tool_calls.family import Calls, Family, Offered

_START, _END = "<|python_start|>", "<|python_end|>"
_LONGEST = 1 << 15  # characters: parsing takes a millisecond for a thousand, on the server's loop
_JSON_NAMES = {"true": True, "false": False, "null": None}


def read(text: str, offered: Offered) -> Calls | None:
    if len(text) > _LONGEST:
        return None
    try:
        found = ast.parse(text.strip().removesuffix(_END).strip(), mode="eval").body
        calls = [_call(each) for each in found.elts] if isinstance(found, ast.List) else []
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    return calls if calls and all(name in offered for name, _ in calls) else None


def _call(node: ast.expr) -> tuple[str, str]:
    """Raises ValueError for what is none, or has arguments without a name."""
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError(node)
    arguments = {each.arg: _value(each.value) for each in node.keywords}
    if None in arguments:
        raise ValueError(node)  # **other
    return ast.unparse(node.func), json.dumps(arguments, allow_nan=False)


def _value(node: ast.expr) -> Any:
    """A literal, of Python or JSON. Raises ValueError for anything else."""
    match node:
        case ast.Constant(value=str() | int() | float() | None):
            return node.value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.List() | ast.Tuple():
            return [_value(each) for each in node.elts]
        case ast.Dict(keys=keys) if all(isinstance(key, ast.Constant) for key in keys):
            return {
                str(_value(key)): _value(value) for key, value in zip(keys, node.values, strict=True) if key
            }
        case ast.Name(id=name) if name in _JSON_NAMES:
            return _JSON_NAMES[name]
    raise ValueError(node)


PYTHONIC = Family(
    name="pythonic",
    before=lambda name: f"[{name}(",
    after=")]",
    skipped=(_START,),
    specials=(_START, _END),
    read=read,
)
