"""The body of `POST /v1/responses`, and the chat request that answers it.

A response is a chat: its input becomes messages, its format of text `response_format`, its tools tools. So what a
chat honours, a response does, and what a chat refuses is refused, under the name that it has here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Final, Literal

from pydantic import Field, StringConstraints, WithJsonSchema

from veneer.errors import InvalidRequest
from veneer.server.wire import (
    ChatRequest,
    GenerationRequest,
    NotHonoured,
    Strict,
    anything,
    check_body,
    check_harmless,
    empty,
    only,
)

LOGPROBS = "message.output_text.logprobs"
Include = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",  # of items that this server never makes, as those below
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
Label = Annotated[str, StringConstraints(max_length=64)]
Value = Annotated[str, StringConstraints(max_length=512)]


class TextFormat(Strict):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    description: str | None = None
    strict: bool | None = None


class TextOptions(Strict):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None  # others: say it in a message


class FunctionTool(Strict):
    type: Literal["function"]
    name: Annotated[str, Field(min_length=1, max_length=128)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(Strict):
    type: Literal["function"]
    name: str


class AllowedFunctions(Strict):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Field(min_length=1)]


# Read by response_items.py, whose errors name the item.
_ITEMS = {"type": "array", "minItems": 1, "items": {"type": "object"}}
Input = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, _ITEMS]})]


class ResponseRequest(Strict):
    model: Annotated[str, Field(min_length=1)]
    input: Input
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None  # None: if this server stores any
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    include: list[Include] = Field(default=[])
    text: TextOptions | None = None
    tools: list[FunctionTool] = Field(default=[], max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | AllowedFunctions = "auto"
    parallel_tool_calls: bool = True
    truncation: Literal["auto", "disabled"] = "disabled"
    metadata: dict[Label, Value] = Field(default={}, max_length=16)
    service_tier: Literal["auto", "default"] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None  # a routing hint; the prefix cache needs none

    @property
    def with_logprobs(self) -> bool:
        return LOGPROBS in self.include


def _asks_nothing(value: Any) -> bool:
    """Of `reasoning`: no effort and no summary."""
    return isinstance(value, dict) and all(each in (None, "none") for each in value.values())


_REFUSED: Final[dict[str, NotHonoured]] = {
    "background": NotHonoured(only(False), "responses are computed while the client waits; stream them"),
    "conversation": NotHonoured(only(), "go on from a response with previous_response_id"),
    "context_management": NotHonoured(empty, "leave it out, or set truncation to auto"),
    "max_tool_calls": NotHonoured(only(), "it is for tools that the server runs, and this one runs none"),
    "prompt": NotHonoured(only(), "this server stores no prompts; send input and instructions"),
    "reasoning": NotHonoured(_asks_nothing, "pass what the chat template reads in chat_template_kwargs"),
    "moderation": NotHonoured(only(), "this server has no moderation"),
    "prompt_cache_retention": NotHonoured(only("in_memory"), "the prefix cache lives in memory"),
    "prompt_cache_options": NotHonoured(anything, ""),
    "n": NotHonoured(only(1), "a response has one answer; send several requests"),
    "max_tokens": NotHonoured(only(), "use max_output_tokens"),
    "logprobs": NotHonoured(only(False), f"put {LOGPROBS!r} into include"),
    "prompt_logprobs": NotHonoured(only(), "send the prompt to /v1/completions"),
    "response_format": NotHonoured(only({"type": "text"}), "use text.format"),
}
# What else a chat request has that makes sense here: sampling beyond OpenAI's, the adapter's task, the template.
PASSED = (
    (set(GenerationRequest.model_fields) | {"chat_template_kwargs"})
    - set(ResponseRequest.model_fields)
    - set(_REFUSED)
)
_CHAT_NAMES = {  # of a chat's fields here; longer ones first
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "messages": "input",
}


def read_request(
    data: dict[str, Any], unknown: Callable[[str], None]
) -> tuple[ResponseRequest, dict[str, Any]]:
    """The body, and those of its fields that go to the chat request as they are. Raises InvalidRequest."""
    passed = {name: value for name, value in data.items() if name in PASSED}
    given = {name: value for name, value in data.items() if name not in PASSED}
    for name in given.keys() & _REFUSED.keys():
        check_harmless(name, given.pop(name), _REFUSED[name])
    _check_tools(given)
    body = check_body(given, ResponseRequest, unknown)
    options = body.stream_options or {}
    if options and not body.stream:
        raise InvalidRequest("stream_options is allowed only with stream: true.", param="stream_options")
    if options.get("include_obfuscation"):
        rule = NotHonoured(only(False), "chunks are sent as they are")
        check_harmless("stream_options.include_obfuscation", options["include_obfuscation"], rule)
    if body.top_logprobs and not body.with_logprobs:
        raise InvalidRequest(
            f"top_logprobs is allowed only with {LOGPROBS!r} in include.", param="top_logprobs"
        )
    return body, passed


def _check_tools(given: dict[str, Any]) -> None:
    """Name what is no function, before the types are checked."""
    tools = given.get("tools")
    for index, tool in enumerate(tools if isinstance(tools, list) else []):
        kind = tool.get("type") if isinstance(tool, dict) else None
        if isinstance(kind, str) and kind != "function":
            message = (
                f"tools[{index}].type={kind!r} is not supported: this server runs no tools; use functions."
            )
            raise InvalidRequest(message, param=f"tools[{index}].type", code="unsupported_parameter")


def chat_request(
    body: ResponseRequest,
    passed: dict[str, Any],
    messages: list[dict[str, Any]],
    unknown: Callable[[str], None],
) -> ChatRequest:
    """Raises InvalidRequest, with a param of this route."""
    data: dict[str, Any] = {
        **passed,
        "model": body.model,
        "messages": messages,
        "temperature": body.temperature,
        "top_p": body.top_p,
    }
    if body.max_output_tokens is not None:
        data["max_completion_tokens"] = body.max_output_tokens
    if body.with_logprobs:
        data |= {"logprobs": True, "top_logprobs": body.top_logprobs}
    if body.text and body.text.format and body.text.format.type != "text":
        data["response_format"] = _response_format(body.text.format)
    if body.tools:
        choice = body.tool_choice
        data["tools"] = [_chat_tool(tool) for tool in body.tools]
        data["parallel_tool_calls"] = body.parallel_tool_calls
        if isinstance(choice, NamedFunction):
            data["tool_choice"] = _named_tool(choice)
        elif isinstance(choice, AllowedFunctions):
            allowed = {"mode": choice.mode, "tools": [_named_tool(each) for each in choice.tools]}
            data["tool_choice"] = {"type": "allowed_tools", "allowed_tools": allowed}
        elif choice != "auto":
            data["tool_choice"] = choice
    elif body.tool_choice not in ("auto", "none"):
        message = "tool_choice: it asks for a call and there are no tools; send them in tools."
        raise InvalidRequest(message, param="tool_choice")
    try:
        return check_body(data, ChatRequest, unknown)
    except InvalidRequest as error:
        raise renamed(error) from None


def _response_format(form: TextFormat) -> dict[str, Any]:
    """The chat's; in a response the schema stands beside its type."""
    if form.type == "json_object":
        return {"type": "json_object"}
    fields = form.model_dump(by_alias=True, exclude_none=True, exclude={"type"})
    return {"type": "json_schema", "json_schema": fields}


def _chat_tool(tool: FunctionTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}


def _named_tool(function: NamedFunction) -> dict[str, Any]:
    return {"type": "function", "function": {"name": function.name}}


def renamed(error: InvalidRequest) -> InvalidRequest:
    """The error of a chat request in this route's words."""
    for theirs, ours in _CHAT_NAMES.items():
        if (error.param or "").startswith(theirs):
            message = error.message.replace(theirs, ours)
            return type(error)(message, param=ours, code=error.code)
    return error
