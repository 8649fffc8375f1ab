"""What the methods of PEFT have in common: reading a config field by field, choosing sites, matching patterns.

Strings that peft takes for regular expressions are never run: a `target_modules` string leaves the choice to
the keys of the file, and the keys of rank_pattern and alpha_pattern may be plain names only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
import torch

from veneer.adapters.checkpoint import listed, shown
from veneer.adapters.methods.base import Base
from veneer.adapters.names import CONFIG_FILE
from veneer.adapters.program import EMBEDDING, HEAD, Site, SiteProgram
from veneer.errors import AdapterRefused

PREFIX = "base_model.model."
_PATTERN_LIMIT = 4096  # entries of rank_pattern or alpha_pattern
_LAYERS_PATTERN_LIMIT = 64  # entries
_TASK_LIMIT = 256  # each is lowered and run once before an upload is taken


class Targeting(msgspec.Struct, frozen=True, kw_only=True):
    """The fields by which most of peft's tuners choose their layers, with peft's defaults."""

    base_model_name_or_path: str | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None


class Common(msgspec.Struct, frozen=True, kw_only=True):
    """Fields of every config of peft that do not change what an adapter computes."""

    auto_mapping: dict[str, Any] | None = None
    inference_mode: bool = False
    peft_version: str | None = None
    revision: str | None = None


class Refusal(NamedTuple):
    """A field that is served only with the values under which it is off."""

    off: tuple[Any, ...]
    reason: str


CAUSAL = Refusal((None, "CAUSAL_LM"), "only causal language models are served")
BASE_BIASES = Refusal(("none",), "it replaces biases of the base, which is shared; train with bias='none'")
NO_FIELD = Refusal((None,), "PEFT's config of this method has no such field and drops it; remove it")
WHOLE_MODULES = Refusal((None, []), "whole modules are read before the method's own fields")

S = TypeVar("S", bound=msgspec.Struct)


def read_fields(
    config: Mapping[str, Any],
    honoured: type[S],
    training_only: type[msgspec.Struct],
    refused: Mapping[str, Refusal],
    reference: str,
    library: str = "PEFT 0.21",
) -> S:
    """The fields that count, after every field was looked at. `reference` is the name of the library's class.

    Raises:
        AdapterRefused: a field is unknown, of a wrong type, or asks for what is not served.
    """
    known = {*honoured.__struct_fields__, *training_only.__struct_fields__, *refused}
    if unknown := sorted(config.keys() - known):
        raise AdapterRefused(
            f"{CONFIG_FILE}: unknown fields {listed(unknown)}. Every field must be one of {library}'s "
            f"{reference}; remove them if the adapter was trained without them."
        )
    for name, (off, reason) in refused.items():
        value = config.get(name, off[0])
        if not any(type(value) is type(allowed) and value == allowed for allowed in off):
            raise wrong(name, value, f"{reason}. Served: {', '.join(map(json.dumps, off))}")
    _convert(config, training_only)
    return _convert(config, honoured)


def _convert(config: Mapping[str, Any], kind: type[S]) -> S:
    fields = {name: config[name] for name in kind.__struct_fields__ if name in config}
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        rule, _, place = str(error).partition(" - at `$.")
        name = re.split(r"\W", place, maxsplit=1)[0]
        raise wrong(name, fields.get(name), rule) from error


def wrong(field: str, value: object, rule: str) -> AdapterRefused:
    """The refusal of a config's field: its name, its value, the rule."""
    text = json.dumps(value)
    return AdapterRefused(f"{CONFIG_FILE}: {field} = {text[:200]}{'…' * (len(text) > 200)}: {rule}.")


def choose_sites(
    config: Targeting,
    base: Base,
    header: Iterable[str],
    part: str,
    warnings: list[str],
    *,
    embedding: bool = False,
) -> list[Site]:
    """The sites that the config names, as peft's check_target_module_exists chooses them.

    `part` is what follows the module in the file's keys, e.g. ".lora_"; `embedding`: it may be one of them.
    """
    targets, excluded = config.target_modules, config.exclude_modules
    known = {**base.sites, EMBEDDING: base.embedding} if embedding else base.sites
    in_file = {key.removeprefix(PREFIX).partition(part)[0] for key in header}
    if isinstance(targets, list):
        chosen = _listed_targets(config, set(targets), known, warnings)
    elif targets is None:
        raise wrong("target_modules", None, "it must list the layers that the adapter changes")
    elif config.layers_to_transform is not None or config.layers_pattern is not None:
        raise wrong("target_modules", targets, "with layers_to_transform or layers_pattern it must be a list")
    elif targets.lower() == "all-linear":
        chosen = [name for name in base.sites if name != HEAD]  # as PEFT does
    else:  # a regular expression
        chosen = [name for name in known if name in in_file]
    if isinstance(excluded, list):
        names = set(excluded)
        chosen = [name for name in chosen if not _is_listed(name, names)]
    elif excluded:  # a regular expression
        chosen = [name for name in chosen if name in in_file]
    if not chosen:
        raise wrong("target_modules", targets, f"no layer of the base matches; it has {listed(base.sites)}")
    return [known[name] for name in chosen]


def _listed_targets(
    config: Targeting, targets: set[str], sites: Mapping[str, Site], warnings: list[str]
) -> list[str]:
    for target in targets:
        if target.rpartition(".")[2] == "embed_tokens" and EMBEDDING not in sites:
            raise wrong("target_modules", target, "only LORA is served at the embedding; leave it out")
    if unmatched := sorted(targets - {suffix for name in sites for suffix in _suffixes(name)}):
        warnings.append(f"target_modules: the base has no linear layer {listed(unmatched)}.")
    in_layers = _layer_filter(config)
    return [name for name in sites if name in targets or (_is_listed(name, targets) and in_layers(name))]


def _suffixes(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


def _is_listed(name: str, names: set[str]) -> bool:
    return any(suffix in names for suffix in _suffixes(name))


def _layer_filter(config: Targeting) -> Callable[[str], bool]:
    """Whether layers_to_transform and layers_pattern choose a module that target_modules names by suffix."""
    layers, patterns = config.layers_to_transform, config.layers_pattern or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if layers is None or layers == []:
        if patterns:
            raise wrong("layers_pattern", patterns, "it needs layers_to_transform")
        return lambda name: True
    if len(patterns) > _LAYERS_PATTERN_LIMIT:
        raise wrong("layers_pattern", f"{len(patterns)} entries", f"the limit is {_LAYERS_PATTERN_LIMIT}")
    for pattern in patterns:
        if not re.fullmatch(r"\w+", pattern, re.ASCII):
            raise wrong("layers_pattern", pattern, "only the plain name of a module list is served")
    chosen = {layers} if isinstance(layers, int) else set(layers)
    return lambda name: _layer_index(name, patterns) in chosen


def _layer_index(name: str, patterns: Sequence[str]) -> int | None:
    """The number after the first module called like one of `patterns`, or after any but the first module."""
    parts = name.split(".")
    for pattern in patterns or ("",):
        for at in range(len(parts) - 2):
            if parts[at + 1].isdigit() and (parts[at] == pattern if pattern else at > 0):
                return int(parts[at + 1])
    return None


def compile_pattern(field: str, keys: Collection[str]) -> Callable[[str], str | None]:
    """A function from a module's name to the first of `keys` that matches it.

    peft matches with `re.match(rf"(.*\\.)?({key})$", name)`. Served are keys without operators, in which "."
    stands for any one character, as it does there; a leading "^" ties the key to the start of the name.
    """
    if len(keys) > _PATTERN_LIMIT:
        raise wrong(field, f"{len(keys)} entries", f"the limit is {_PATTERN_LIMIT}")
    compiled = []
    for key in keys:
        if not re.fullmatch(r"\^?([\w.-]|\\\.)+\$?", key, re.ASCII):
            raise wrong(field, key, "regular expressions are not served; write full module names")
        tokens = re.findall(r"\\?.", key.removeprefix("^").removesuffix("$"))
        compiled.append((key, key.startswith("^"), tokens))

    def first(name: str) -> str | None:
        for key, anchored, tokens in compiled:
            rest = name[: max(0, len(name) - len(tokens))]
            tail = name[len(rest) :]
            starts = not rest or (rest.endswith(".") and not anchored)
            if starts and len(tail) == len(tokens) and all(map(_fits, tokens, tail)):
                return key
        return None

    return first


def _fits(token: str, character: str) -> bool:
    return token in (".", character) or (token == "\\." and character == ".")


def check_rank(rank: int, max_rank: int, field: str = "r") -> None:
    if not 1 <= rank <= max_rank:
        raise wrong(field, rank, f"the rank must be from 1 to {max_rank} (--max-lora-rank)")


def check_tasks(field: str, tasks: int, task: int) -> int:
    """The number of tasks of a file, when it is one that is served and has this one."""
    if not 1 <= tasks <= _TASK_LIMIT:
        raise wrong(field, tasks, f"the number of tasks must be from 1 to {_TASK_LIMIT}")
    if task >= tasks:
        raise wrong(field, tasks, f"there is no task {task}; the first is 0")
    return tasks


def add_head_copy(
    shapes: dict[str, tuple[int, ...]], header: Collection[str], sites: Iterable[Site], warnings: list[str]
) -> None:
    """Allow the frozen weight of a targeted head or embedding, which PEFT adds to the file.

    It is the base's, never read.
    """
    for site in sites:
        name = f"{PREFIX}{site.name}.base_layer.weight"
        if site.name in (HEAD, EMBEDDING) and name in header:
            sizes = site.out_features, site.in_features
            shapes[name] = sizes if site.name == HEAD else sizes[::-1]
            what = "output head" if site.name == HEAD else "embedding"
            warnings.append(f"{name}: this copy of the base's {what} is not used.")


def explain_for(part: str, base: Base) -> Callable[[str], str]:
    """Why a tensor that the config does not name is refused, for `Checkpoint.require`.

    `part` is what follows the module in the keys of the method, e.g. ".vera_".
    """

    def explain(key: str) -> str:
        module, found, rest = key.removeprefix(PREFIX).partition(part)
        if not key.startswith("base_model."):
            return "PEFT's keys begin with 'base_model.'"
        if not key.startswith(PREFIX) or not found:
            return "the config names no such tensor, and an adapter cannot replace the base's own"
        if module not in base.sites:
            return f"the base has no linear layer {shown(module)}"
        return f"the config does not ask for {part[1:]}{rest} at this layer"

    return explain


def low_rank(site: Site, a: torch.Tensor, b: torch.Tensor) -> SiteProgram:
    """The product b^T a of a site, a [rank, in] and b [rank, out], refused if a value overflows float32."""
    a, b = a.float().contiguous(), b.float().contiguous()
    if not (a.isfinite().all() and b.isfinite().all()):
        raise AdapterRefused(f"The change of {site.name} overflows; the adapter's values are too large.")
    return SiteProgram(a=a, b=b)


V = TypeVar("V")


def per_site(
    sites: Iterable[Site], field: str, pattern: Mapping[str, V] | None, default: V, warnings: list[str]
) -> list[V]:
    """The value for each site: that of the first key of the config's `field` that matches it, or `default`."""
    pattern = pattern or {}
    first = compile_pattern(field, pattern)
    return _decided([first(site.name) for site in sites], field, pattern, default, warnings)


def _decided(
    keys: list[str | None], field: str, pattern: Mapping[str, V], default: V, warnings: list[str]
) -> list[V]:
    """The values for the keys that decide for each site; a key that decides for none is worth a warning."""
    if idle := [key for key in pattern if key not in keys]:
        warnings.append(f"{field}: {listed(idle)} decides for no layer.")
    return [default if key is None else pattern[key] for key in keys]


def check_need(site: Site, rank: int, max_rank: int, field: str, value: object) -> None:
    """Refuse `field` = `value` when a site's change is a product of more than `max_rank` rows because of it."""
    if rank > max_rank:
        raise wrong(field, value, f"{site.name} needs rank {rank}, the limit is {max_rank} (--max-lora-rank)")


def per_inner_site(
    sites: Iterable[Site], field: str, pattern: Mapping[str, V] | None, default: V, warnings: list[str]
) -> list[V]:
    """`per_site` where peft matches with `rf".*\\.{key}$"`: what a key names comes after a dot.

    A full name counts only where no key matches, and a "^" never matches.
    """
    pattern = pattern or {}
    if outer := [key for key in pattern if key.startswith((".", "^"))]:
        raise wrong(
            field, outer[0], "PEFT matches what comes after a dot of the module's name; leave this one out"
        )
    first = compile_pattern(field, pattern)
    keys = [first(f"\0{site.name}") or (site.name if site.name in pattern else None) for site in sites]
    return _decided(keys, field, pattern, default, warnings)


def random_positions(site: Site, count: int, seed: int) -> torch.Tensor:
    """Row and column [2, count] of distinct entries of a site's weight, as peft draws them: they are in no file."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(site.out_features * site.in_features, generator=generator)[:count]
    return torch.stack([order // site.in_features, order % site.in_features])


Seed = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]  # what torch.Generator takes


def check_count(field: str, value: object, count: int, site: Site) -> None:
    """Refuse `field` = `value` when with it the entries of a site's weight are not from 1 to all of them."""
    size = site.in_features * site.out_features
    if not 1 <= count <= size:
        raise wrong(field, value, f"that makes {count} entries; {site.name} has room for 1 to {size}")
