"""Parts of bodies that have fields of their own: answers with a structure, and tools."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Schema = dict[str, Any] | bool
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class _Open(BaseModel):
    """Fields that nobody here knows are kept: a chat template may."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class _Closed(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())


class JsonSchema(_Closed):
    name: Name
    description: str | None = None
    schema_: Annotated[Schema, Field(alias="schema")]
    strict: bool | None = None  # the schema is enforced either way


class ResponseFormat(_Closed):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(_Closed):
    """vLLM's; exactly one of the first five."""

    json_: Annotated[Schema | str | None, Field(alias="json")] = None  # a schema, or its text
    json_object: bool | None = None
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=10_000)] | None = None
    grammar: str | None = None
    disable_any_whitespace: bool = False


class TextPart(_Closed):
    type: Literal["text"]
    text: str


class Prediction(_Closed):
    """What the answer will repeat in part."""

    type: Literal["content"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]

    @property
    def text(self) -> str:
        parts = self.content
        return parts if isinstance(parts, str) else "".join(part.text for part in parts)


class Function(_Open):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Open):
    type: Literal["function"]
    function: Function


class NamedFunction(_Open):
    name: str


class NamedTool(_Open):
    type: Literal["function"]
    function: NamedFunction


class AllowedTools(_Open):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1)]


class AllowedToolsChoice(_Open):
    """Some of the tools; all stay in the prompt."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedToolsChoice
