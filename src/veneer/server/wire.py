"""The bodies of chat, completions, embeddings and `/tokenize`: what is read, what is refused.

Three kinds of field, and nothing else:

* fields of the models below are honoured,
* fields of `NOT_HONOURED` are documented by OpenAI or vLLM and refused by name, unless their value is one
  that asks for nothing,
* any other field is accepted, logged once and counted.

Null means absent. Values must have JSON's own type: no number for a string, no string for a number.
"""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Callable
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeVar, cast

import msgspec
from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from veneer.errors import InvalidRequest, TooLarge
from veneer.server.blend_wire import MergedAdapters, Mixture, Rank, WeightedAdapters
from veneer.server.errors import pydantic_error
from veneer.server.fields import Prediction, ResponseFormat, StructuredOutputs, Tool, ToolChoice

log = logging.getLogger(__name__)

INT64 = 2**63
Seed = Annotated[int, Field(ge=-INT64, lt=INT64)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
StopString = Annotated[str, Field(min_length=1, max_length=1024)]
MOST_STOPS = 64  # OpenAI takes 4; tasks of lm-evaluation-harness have more
MOST_LOGPROBS = 20  # vLLM's bound
MOST_DRAFT_TOKENS = 64
DRAFT_TOKENS = 10  # with a prediction alone
LoraPath = str | Annotated[list[str | None], Field(min_length=1, max_length=1024)] | None
Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class StreamOptions(Strict):
    include_usage: bool = False  # in a chunk of its own at the end
    continuous_usage_stats: bool = False  # vLLM's: so far, in each chunk


class ModelRequest(Strict):
    """Whom a request asks, and how long it may take."""

    model: Annotated[str, Field(min_length=1)]
    lora_path: LoraPath = None  # SGLang's: an adapter's name, with the base as model
    # ours
    task_id: Annotated[int, Field(ge=0, lt=2**31)] | None = None  # for an adapter with several tasks
    timeout: Annotated[float, Field(gt=0, le=86400)] | None = None  # seconds for the whole request
    adapters: WeightedAdapters | None = None  # several at once, with the base as model
    max_rank: Rank | None = None  # of these: products of a higher rank are cut to it
    merged_adapters: MergedAdapters | None = None  # the same in LoRAX's words

    @property
    def mixture(self) -> Mixture:
        return Mixture(self.adapters, self.merged_adapters, self.max_rank)


class GenerationRequest(ModelRequest):
    """What both routes read. The defaults are OpenAI's, for vLLM's fields vLLM's."""

    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MOST_STOPS)] | None = None
    seed: Seed | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: dict[str, Bias] = {}
    # vLLM's
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] = []
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 0
    response_format: ResponseFormat | None = None  # OpenAI's for chat; vLLM has it on both routes
    structured_outputs: StructuredOutputs | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    prompt_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    # transformers'
    prompt_lookup_num_tokens: Annotated[int, Field(ge=0, le=MOST_DRAFT_TOKENS)] | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def prompt_scores(self) -> int | None:
        """How many log probabilities of likeliest tokens the answer needs at each of the prompt; None for none."""
        return self.prompt_logprobs

    @property
    def draft_tokens(self) -> int:
        """How many tokens a step may draft."""
        return self.prompt_lookup_num_tokens or 0


class Conversation(Strict):
    """Messages and tools, and how they become a prompt."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    tools: Annotated[list[Tool], Field(max_length=128)] = []
    tool_choice: ToolChoice | None = None  # auto when there are tools
    parallel_tool_calls: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] = {}


class ChatRequest(GenerationRequest, Conversation):
    max_completion_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    prediction: Prediction | None = None

    @property
    def draft_tokens(self) -> int:
        default = 0 if self.prediction is None else DRAFT_TOKENS
        return default if self.prompt_lookup_num_tokens is None else self.prompt_lookup_num_tokens


class CompletionRequest(GenerationRequest):
    prompt: (
        str
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool = False
    add_special_tokens: bool = True

    @property
    def prompt_scores(self) -> int | None:
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((count for count in wanted if count is not None), default=None)


class EmbeddingRequest(ModelRequest):
    input: (
        str
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    add_special_tokens: bool = True  # vLLM's
    pooling: Literal["mean", "last"] = "mean"  # ours

    @property
    def has_many(self) -> bool:
        return isinstance(self.input, list) and not isinstance(self.input[0], int)

    @property
    def inputs(self) -> list[str | list[int]]:
        return cast(list[str | list[int]], self.input if self.has_many else [self.input])


class TokenizeText(Strict):
    model: Annotated[str, Field(min_length=1)] | None = None  # None: the base
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChat(Conversation):
    model: Annotated[str, Field(min_length=1)] | None = None
    return_token_strs: bool = False


class Detokenize(Strict):
    model: Annotated[str, Field(min_length=1)] | None = None
    tokens: list[TokenId]


def anything(value: Any) -> bool:
    return True


def only(*values: Any) -> Callable[[Any], bool]:
    """Accept just these values (and no others that compare equal, like 0 for false)."""
    return lambda value: any(value == each and type(value) is type(each) for each in values)


def empty(value: Any) -> bool:
    return value in ("", [], {})


class NotHonoured(NamedTuple):
    harmless: Callable[[Any], bool]  # whether a value asks for nothing, so that it is accepted
    why: str


_LATER: Final = "this release does not have it"
_TEXT: Final = "this server answers with plain text"
_GUIDED: Final = "vLLM has replaced it; use structured_outputs"
_TRANSFER: Final = "this server does not move caches between servers"

NOT_HONOURED: Final[dict[str, NotHonoured]] = {
    # OpenAI, both routes. The labels concern nobody but the caller.
    "user": NotHonoured(anything, ""),
    "metadata": NotHonoured(anything, ""),
    "safety_identifier": NotHonoured(anything, ""),
    "prompt_cache_key": NotHonoured(anything, ""),  # a routing hint; the prefix cache needs none
    "best_of": NotHonoured(only(1), "use n"),
    "suffix": NotHonoured(empty, "write the suffix into the prompt"),
    # OpenAI, chat
    "store": NotHonoured(only(False), "this server stores no completions"),
    "modalities": NotHonoured(only(["text"]), _TEXT),
    "audio": NotHonoured(only(), _TEXT),
    "functions": NotHonoured(empty, "OpenAI has replaced it; use tools"),
    "function_call": NotHonoured(only("none"), "OpenAI has replaced it; use tool_choice"),
    "web_search_options": NotHonoured(only(), "this server does not search the web"),
    "moderation": NotHonoured(only(), "this server has no moderation"),
    "verbosity": NotHonoured(only("medium"), "the base does not know it; say it in a message"),
    "reasoning_effort": NotHonoured(
        only("none"), "pass what the chat template reads in chat_template_kwargs"
    ),
    "prompt_cache_retention": NotHonoured(only("in_memory"), "the prefix cache lives in memory"),
    "prompt_cache_options": NotHonoured(only(), "the prefix cache needs none"),
    # vLLM
    "use_beam_search": NotHonoured(only(False), "beam search is not supported; use n"),
    "length_penalty": NotHonoured(only(1.0, 1), "it belongs to beam search, which is not supported"),
    "spaces_between_special_tokens": NotHonoured(only(True), _LATER),
    "truncate_prompt_tokens": NotHonoured(only(), "shorten the prompt before sending it"),
    "truncation_side": NotHonoured(only(), "shorten the prompt before sending it"),
    "logprob_token_ids": NotHonoured(only(), _LATER),
    "allowed_token_ids": NotHonoured(only(), "use logit_bias"),
    "bad_words": NotHonoured(empty, "use logit_bias"),
    "watermarking": NotHonoured(only(False), _LATER),
    "documents": NotHonoured(empty, "write the documents into a message"),
    "chat_template": NotHonoured(only(), "templates come with the model, never with a request"),
    "media_io_kwargs": NotHonoured(empty, _TEXT),
    "mm_processor_kwargs": NotHonoured(empty, _TEXT),
    "guided_json": NotHonoured(only(), _GUIDED),
    "guided_regex": NotHonoured(only(), _GUIDED),
    "guided_choice": NotHonoured(only(), _GUIDED),
    "guided_grammar": NotHonoured(only(), _GUIDED),
    "guided_decoding_backend": NotHonoured(only(), "there is one way; leave it out"),
    "guided_whitespace_pattern": NotHonoured(only(), _GUIDED),
    "regex": NotHonoured(only(), "use structured_outputs"),  # SGLang's, as the next
    "ebnf": NotHonoured(only(), "use structured_outputs with a grammar"),
    "structural_tag": NotHonoured(only(), "use tools, or structured_outputs with a grammar"),
    "priority": NotHonoured(only(0), "requests are served first come, first served"),
    "request_id": NotHonoured(only(), "the server names requests itself; the reply's id says how"),
    "session_id": NotHonoured(anything, ""),  # a routing hint
    "return_tokens_as_token_ids": NotHonoured(only(False), _LATER),
    "return_token_ids": NotHonoured(only(False), _LATER),
    "return_token_offsets": NotHonoured(only(False), _LATER),
    "return_prompt_text": NotHonoured(only(False), _LATER),
    "routed_experts_prompt_start": NotHonoured(only(0), _LATER),
    "return_mm_kwargs": NotHonoured(only(True), _TEXT),
    "cache_salt": NotHonoured(only(), "prefixes are shared between requests for the same adapter"),
    "kv_transfer_params": NotHonoured(empty, _TRANSFER),
    "ec_transfer_params": NotHonoured(empty, _TRANSFER),
    "vllm_xargs": NotHonoured(empty, _LATER),
    "repetition_detection": NotHonoured(only(), "use repetition_penalty"),
    "thinking_token_budget": NotHonoured(only(-1), _LATER),
    "include_reasoning": NotHonoured(only(True), _LATER),
    "stream_interval": NotHonoured(only(1), _LATER),
    "prompt_embeds": NotHonoured(only(), "send text or token ids as prompt"),
    "logits_processors": NotHonoured(empty, _LATER),
    # in stream_options
    "stream_options.include_obfuscation": NotHonoured(only(False), "chunks are sent as they are"),
}
# Fields of one route that the other does not have.
CHAT_ONLY = set(ChatRequest.model_fields) - set(CompletionRequest.model_fields)
COMPLETIONS_ONLY = set(CompletionRequest.model_fields) - set(ChatRequest.model_fields)
TEXTS = "must be text, a list of texts, a list of token ids, or a list of lists of token ids, not empty"
# What a field with several forms takes; pydantic would describe the first form only.
FORMS = {
    "prompt": TEXTS,
    "input": TEXTS,
    "lora_path": "must be an adapter's name, or a list of them",
    "prediction": 'must be an object with the type "content" and content, text or a list of text parts',
    "stop": f"must be text of 1 to 1024 characters, or a list of at most {MOST_STOPS} of them",
}

Body = TypeVar("Body", bound=Strict)
_logged: set[str] = set()


async def read_body(request: Request, kind: type[Body], limit: int, unknown: Callable[[str], None]) -> Body:
    """Read and check a request's JSON. `limit`: bytes. `unknown` is told of every field nobody documents.

    Raises InvalidRequest (with `param`) or TooLarge.
    """
    return check_body(await read_object(request, limit), kind, unknown)


async def read_object(request: Request, limit: int) -> dict[str, Any]:
    """A request's JSON object without what is null. Raises InvalidRequest or TooLarge."""
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > limit:
            raise TooLarge(f"The request's body is larger than {limit} bytes; send a shorter one.")
    return parse_object(bytes(raw))


def parse_object(raw: bytes) -> dict[str, Any]:
    try:
        data = msgspec.json.decode(raw)
    except (ValueError, RecursionError) as error:  # also lone surrogates, NaN, numbers out of range
        raise InvalidRequest(f"The request's body is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(data, dict):
        raise InvalidRequest("The request's body must be a JSON object.", code="invalid_json")
    data = {name: value for name, value in data.items() if value is not None}
    if isinstance(options := data.get("stream_options"), dict):
        data["stream_options"] = {name: value for name, value in options.items() if value is not None}
    return data


def check_body(data: dict[str, Any], kind: type[Body], unknown: Callable[[str], None]) -> Body:
    """The object as a body of that kind. Raises InvalidRequest (with `param`)."""
    try:
        body = kind.model_validate(data)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        name = str(faults[0]["loc"][0])
        rule = FORMS.get(name) if issubclass(kind, GenerationRequest | EmbeddingRequest) else None
        if rule and name in data:
            raise InvalidRequest(f"{name} {rule} (got {reprlib.repr(data[name])}).", param=name) from None
        raise pydantic_error(list(faults)) from None
    extra = dict(body.model_extra or {})
    if isinstance(body, GenerationRequest) and body.stream_options is not None:
        extra |= {
            f"stream_options.{name}": value for name, value in (body.stream_options.model_extra or {}).items()
        }
    _check_extra(extra, unknown)
    _check_together(body)
    return body


def _check_extra(extra: dict[str, Any], unknown: Callable[[str], None]) -> None:
    for name, value in extra.items():
        if name in CHAT_ONLY or name in COMPLETIONS_ONLY:
            if name == "echo" and value is False:
                continue
            route = "/v1/chat/completions" if name in CHAT_ONLY else "/v1/completions"
            raise InvalidRequest(f"{name} belongs to {route}; leave it out here.", param=name)
        rule = NOT_HONOURED.get(name)
        if rule is None:
            unknown(name)
            _log_once(name)
        else:
            check_harmless(name, value, rule)


def check_harmless(name: str, value: Any, rule: NotHonoured) -> None:
    """Raises InvalidRequest for a value that asks for something."""
    if not rule.harmless(value):
        message = f"{name}={reprlib.repr(value)} is not supported: {rule.why}."
        raise InvalidRequest(message, param=name, code="unsupported_parameter")


def _log_once(name: str) -> None:
    if name not in _logged and len(_logged) < 1000:  # bounded: clients choose the names
        _logged.add(name)
        log.warning("request field %r is unknown and has no effect", name[:64])


def _check_together(body: Strict) -> None:
    """Rules about more than one field."""
    if isinstance(body, GenerationRequest):
        if body.stream_options is not None and not body.stream:
            raise InvalidRequest("stream_options is allowed only with stream: true.", param="stream_options")
        if body.stream and body.prompt_logprobs is not None:
            rule = "comes with a whole answer only; leave it out, or stream"
            raise InvalidRequest(f"prompt_logprobs {rule}.", param="prompt_logprobs")
    if isinstance(body, ChatRequest):
        if body.top_logprobs is not None and not body.logprobs:
            raise InvalidRequest("top_logprobs is allowed only with logprobs: true.", param="top_logprobs")
        if None not in (body.max_completion_tokens, body.max_tokens) and (
            body.max_completion_tokens != body.max_tokens
        ):
            raise InvalidRequest(
                "max_tokens is the old name of max_completion_tokens, but their values differ; send only one.",
                param="max_tokens",
            )
    if isinstance(body, Conversation) and body.continue_final_message and body.add_generation_prompt:
        if "add_generation_prompt" in body.model_fields_set:
            raise InvalidRequest(
                "continue_final_message continues the last message and add_generation_prompt begins a new "
                "one; set only one of them to true.",
                param="continue_final_message",
            )
        body.add_generation_prompt = False
