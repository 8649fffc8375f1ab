"""Which JSON schemas are enforced exactly: the rest is refused here, by keyword and place.

llguidance compiles a schema to a grammar and names most of what it cannot do, but it overlooks keywords it does not
know, takes some values of another draft in silence, and lets keys repeat that only `additionalProperties` or
`patternProperties` describe. So a schema is walked first.

https://json-schema.org/draft/2020-12, https://github.com/guidance-ai/llguidance/blob/main/docs/json_schema.md
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from typing import Any

from veneer.errors import InvalidRequest

DEPTH_LIMIT = 60  # schemas in schemas
_ONE = {"items", "additionalProperties"}
_MANY = {"anyOf", "oneOf", "allOf", "prefixItems"}
_NAMED = {"properties", "patternProperties", "$defs", "definitions"}
_NUMBERS = {
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    *("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"),
}
_PLAIN = {"$ref", "type", "const", "enum", "required", "pattern", "format"}
# These describe; no value is valid or not for them.
_ANNOTATIONS = {
    *("$schema", "$id", "$anchor", "$comment", "title", "description", "default", "examples", "deprecated"),
    *("readOnly", "writeOnly", "contentMediaType", "contentEncoding", "discriminator"),
}
_KNOWN = _ONE | _MANY | _NAMED | _NUMBERS | _PLAIN | _ANNOTATIONS
_DRAFTS = ("draft-06", "draft-07", "2019-09", "2020-12")


def check_schema(schema: Any, param: str) -> None:
    """Raises InvalidRequest that names the keyword and its place if the schema would not be enforced exactly."""
    if schema is False:
        raise _refused(param, "the schema is false: no value is valid")
    if not isinstance(schema, dict | bool):
        raise _refused(param, f"a schema must be an object (got {reprlib.repr(schema)})")
    todo: list[tuple[str, Any, int]] = [(param, schema, 0)]
    while todo:
        place, part, depth = todo.pop()
        if isinstance(part, bool):
            continue
        if not isinstance(part, dict):
            raise _refused(place, f"a schema must be an object, true or false (got {reprlib.repr(part)})")
        if depth > DEPTH_LIMIT:
            raise _refused(param, f"schemas are nested deeper than {DEPTH_LIMIT}; use $ref, or a flatter one")
        _check_keywords(place, part)
        todo += [(where, each, depth + 1) for where, each in _parts(place, part)]


def _check_keywords(place: str, schema: dict[str, Any]) -> None:
    for name in schema:
        if name not in _KNOWN and (not name.startswith("x-") or name == "x-guidance"):
            raise _refused(place, f"the keyword {name[:100]!r} is not supported; leave it out")
    for name in _NUMBERS & schema.keys():
        if isinstance(schema[name], bool) or not isinstance(schema[name], int | float):
            raise _refused(place, f"{name} must be a number (got {reprlib.repr(schema[name])})")
    draft = schema.get("$schema", _DRAFTS[-1])
    if not isinstance(draft, str) or not any(known in draft for known in _DRAFTS):
        raise _refused(place, f"$schema must name one of {', '.join(_DRAFTS)} (got {reprlib.repr(draft)})")
    open_keys = schema.get("additionalProperties", True) is not False or "patternProperties" in schema
    if schema.get("minProperties", 0) > 1 and open_keys:
        raise _refused(
            place,
            "minProperties over 1 is supported only with additionalProperties: false and no patternProperties, "
            "because other keys may repeat",
        )


def _parts(place: str, schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas right inside one, with their places."""
    for name, value in schema.items():
        if name in _ONE:
            if isinstance(value, list):
                raise _refused(place, f"{name} must be one schema; for a list of them use prefixItems")
            yield f"{place}.{name}", value
        elif name in _MANY:
            if not isinstance(value, list) or not value:
                raise _refused(place, f"{name} must be a list of schemas, not empty")
            yield from ((f"{place}.{name}[{index}]", each) for index, each in enumerate(value))
        elif name in _NAMED:
            if not isinstance(value, dict):
                raise _refused(place, f"{name} must be an object of schemas (got {reprlib.repr(value)})")
            yield from ((f"{place}.{name}.{key[:100]}", each) for key, each in value.items())


def _refused(place: str, rule: str) -> InvalidRequest:
    return InvalidRequest(f"{place[:1000]}: {rule}.", param=place[:1000], code="invalid_schema")
