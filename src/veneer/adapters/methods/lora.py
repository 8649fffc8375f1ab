"""PEFT's LORA, read as peft 0.21 writes it: y += s·B(A x) + s·b, with s = α/r, or α/√r for rsLoRA.

Every field of peft's LoraConfig is honoured (`Honoured`), without effect on inference (`TrainingOnly`), or
refused by name unless it is off (`REFUSED`). A field in none of the three is refused as unknown.
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/lora/config.py

Keys are `base_model.model.<module>.lora_A.weight` [r, in], `lora_B.weight` [out, r] and `lora_B.bias` [out].
Strings that peft takes for regular expressions are never run: a `target_modules` string leaves the choice
to the keys of the file, and the keys of rank_pattern and alpha_pattern may be plain names only.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import msgspec

from veneer.adapters.checkpoint import Checkpoint, listed, shown
from veneer.adapters.methods.base import Base
from veneer.adapters.names import CONFIG_FILE
from veneer.adapters.program import Program, Site, SiteProgram
from veneer.errors import AdapterRefused

PREFIX = "base_model.model."
HEAD = "lm_head"  # the output head of every served architecture; PEFT's "all-linear" leaves it out
_PATTERN_LIMIT = 4096  # entries of rank_pattern or alpha_pattern
_LAYERS_PATTERN_LIMIT = 64  # entries


class Honoured(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that decide what the adapter computes, with peft's defaults."""

    peft_type: Literal["LORA"]
    base_model_name_or_path: str | None = None
    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    fan_in_fan_out: bool = False
    lora_bias: bool = False


class TrainingOnly(msgspec.Struct, frozen=True, kw_only=True):
    """Fields without effect on inference. The sub-configs act only with an init_lora_weights, the others
    only with a megatron_config or use_qalora, that is refused or harmless."""

    auto_mapping: dict[str, Any] | None = None
    corda_config: dict[str, Any] | None = None
    eva_config: dict[str, Any] | None = None
    inference_mode: bool = False
    loftq_config: dict[str, Any] | None = None
    lora_dropout: float = 0.0
    lora_ga_config: dict[str, Any] | None = None
    megatron_core: str | None = None
    peft_version: str | None = None
    qalora_group_size: int = 16
    revision: str | None = None
    runtime_config: dict[str, Any] | None = None


class Refusal(NamedTuple):
    """A field that is served only with the values under which it is off."""

    off: tuple[Any, ...]
    reason: str


_CONVERT = (
    "PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ change the base; convert the adapter with PEFT's save_pretrained"
    "(folder, path_initial_model_for_weight_conversion=...), which writes a plain LoRA"
)
_LATER = "this variant of LoRA is not served; train a plain LoRA"
REFUSED: Mapping[str, Refusal] = {
    "alora_invocation_tokens": Refusal((None,), "activated LoRA is not served; train a plain LoRA"),
    "arrow_config": Refusal((None,), "Arrow routing over several adapters is not served"),
    "bias": Refusal(("none",), "it replaces biases of the base, which is shared; use lora_bias"),
    "ensure_weight_tying": Refusal((False,), "adapters on tied embeddings are not served"),
    "init_lora_weights": Refusal((True, False, "gaussian", "eva", "orthogonal", "mica"), _CONVERT),
    "kasa_config": Refusal((None,), "KaSA changes the base; train a plain LoRA"),
    "layer_replication": Refusal((None, []), "it makes a base of another depth"),
    "megatron_config": Refusal((None,), "Megatron's parallel layers are not served"),
    "modules_to_save": Refusal((None, []), "it replaces whole layers of the base; use LoRA on them"),
    "monteclora_config": Refusal((None,), _LATER),
    "target_parameters": Refusal((None, []), "only linear layers are served; use target_modules"),
    "task_type": Refusal((None, "CAUSAL_LM"), "only causal language models are served"),
    "trainable_token_indices": Refusal((None,), "it replaces embeddings of the base, which is shared"),
    "use_bdlora": Refusal((None,), _LATER),
    "use_dora": Refusal((False,), "DoRA is not served; train with use_dora=false"),
    "use_qalora": Refusal((False,), "QALoRA needs a GPTQ base; train a plain LoRA"),
    "velora_config": Refusal((None,), _LATER),
}

_Struct = TypeVar("_Struct", bound=msgspec.Struct)


class _Scaled(NamedTuple):
    """A site the adapter changes."""

    site: Site
    rank: int
    scale: float


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a PEFT LoRA. See `veneer.adapters.methods.base.Method`."""
    config = read_config(checkpoint.config)
    warnings: list[str] = []
    sites = _scaled(config, _targets(config, base, checkpoint.header, warnings), max_rank, warnings)
    shapes = _shapes(config, sites)
    dump = f"{PREFIX}{HEAD}.base_layer.weight"
    if dump in checkpoint.header and any(item.site.name == HEAD for item in sites):
        # PEFT adds the frozen weight of a targeted head to the file. It is the base's own and is not read.
        shapes[dump] = (base.sites[HEAD].out_features, base.sites[HEAD].in_features)
        warnings.append(f"{dump}: this copy of the base's output head is not used.")
    if config.fan_in_fan_out:
        warnings.append(
            "fan_in_fan_out: true has no effect on a base of linear layers; PEFT sets it to false."
        )
    checkpoint.require(shapes, lambda key: _explain(key, base))
    return Program(
        kind="lora",
        sites={item.site.name: _read(checkpoint, item, config.lora_bias) for item in sites},
        base_model=config.base_model_name_or_path or "",
        warnings=tuple(warnings),
    )


def read_config(config: Mapping[str, Any]) -> Honoured:
    """The fields that count, after every field was looked at.

    Raises:
        AdapterRefused: a field is unknown, of a wrong type, or asks for what is not served.
    """
    known = {*Honoured.__struct_fields__, *TrainingOnly.__struct_fields__, *REFUSED}
    if unknown := sorted(config.keys() - known):
        raise AdapterRefused(
            f"{CONFIG_FILE}: unknown fields {listed(unknown)}. Every field must be one of PEFT 0.21's "
            "LoraConfig; remove them if the adapter was trained without them."
        )
    for name, (off, reason) in REFUSED.items():
        value = config.get(name, off[0])
        if not any(type(value) is type(allowed) and value == allowed for allowed in off):
            raise _wrong(name, value, f"{reason}. Served: {', '.join(map(json.dumps, off))}")
    _convert(config, TrainingOnly)
    return _convert(config, Honoured)


def _convert(config: Mapping[str, Any], kind: type[_Struct]) -> _Struct:
    fields = {name: config[name] for name in kind.__struct_fields__ if name in config}
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        rule, _, place = str(error).partition(" - at `$.")
        name = re.split(r"\W", place, maxsplit=1)[0]
        raise _wrong(name, fields.get(name), rule) from error


def _wrong(field: str, value: object, rule: str) -> AdapterRefused:
    text = json.dumps(value)
    return AdapterRefused(f"{CONFIG_FILE}: {field} = {text[:200]}{'…' * (len(text) > 200)}: {rule}.")


def _targets(config: Honoured, base: Base, header: Iterable[str], warnings: list[str]) -> list[Site]:
    """The sites that the config names, as peft's check_target_module_exists chooses them."""
    targets, excluded = config.target_modules, config.exclude_modules
    in_file = {key.removeprefix(PREFIX).partition(".lora_")[0] for key in header}
    if isinstance(targets, list):
        chosen = _listed_targets(config, set(targets), base, warnings)
    elif targets is None:
        raise _wrong("target_modules", None, "it must list the layers that the adapter changes")
    elif config.layers_to_transform is not None or config.layers_pattern is not None:
        raise _wrong(
            "target_modules", targets, "with layers_to_transform or layers_pattern it must be a list"
        )
    elif targets.lower() == "all-linear":
        chosen = [name for name in base.sites if name != HEAD]
    else:  # a regular expression
        chosen = [name for name in base.sites if name in in_file]
    if isinstance(excluded, list):
        names = set(excluded)
        chosen = [name for name in chosen if not _is_listed(name, names)]
    elif excluded:  # a regular expression
        chosen = [name for name in chosen if name in in_file]
    if not chosen:
        raise _wrong("target_modules", targets, f"no layer of the base matches; it has {listed(base.sites)}")
    return [base.sites[name] for name in chosen]


def _listed_targets(config: Honoured, targets: set[str], base: Base, warnings: list[str]) -> list[str]:
    for target in targets:
        if target.rpartition(".")[2] == "embed_tokens":
            raise _wrong("target_modules", target, "LoRA on the embedding is not served; leave it out")
    if unmatched := sorted(targets - {suffix for name in base.sites for suffix in _suffixes(name)}):
        warnings.append(f"target_modules: the base has no linear layer {listed(unmatched)}.")
    in_layers = _layer_filter(config)
    return [name for name in base.sites if name in targets or (_is_listed(name, targets) and in_layers(name))]


def _suffixes(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


def _is_listed(name: str, names: set[str]) -> bool:
    return any(suffix in names for suffix in _suffixes(name))


def _layer_filter(config: Honoured) -> Callable[[str], bool]:
    """Whether layers_to_transform and layers_pattern choose a module that target_modules names by suffix."""
    layers, patterns = config.layers_to_transform, config.layers_pattern or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if layers is None or layers == []:
        if patterns:
            raise _wrong("layers_pattern", patterns, "it needs layers_to_transform")
        return lambda name: True
    if len(patterns) > _LAYERS_PATTERN_LIMIT:
        raise _wrong("layers_pattern", f"{len(patterns)} entries", f"the limit is {_LAYERS_PATTERN_LIMIT}")
    for pattern in patterns:
        if not re.fullmatch(r"\w+", pattern, re.ASCII):
            raise _wrong("layers_pattern", pattern, "only the plain name of a module list is served")
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


def _scaled(config: Honoured, sites: list[Site], max_rank: int, warnings: list[str]) -> list[_Scaled]:
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    rank_key, alpha_key = compile_pattern("rank_pattern", ranks), compile_pattern("alpha_pattern", alphas)
    used: dict[str, set[str | None]] = {"rank_pattern": set(), "alpha_pattern": set()}
    scaled = []
    for site in sites:
        in_ranks, in_alphas = rank_key(site.name), alpha_key(site.name)
        used["rank_pattern"].add(in_ranks)
        used["alpha_pattern"].add(in_alphas)
        rank = config.r if in_ranks is None else ranks[in_ranks]
        alpha = config.lora_alpha if in_alphas is None else alphas[in_alphas]
        if not 1 <= rank <= max_rank:
            rule = f"the rank of {site.name} must be from 1 to {max_rank} (--max-lora-rank)"
            raise _wrong("r" if in_ranks is None else "rank_pattern", rank, rule)
        scaled.append(_Scaled(site, rank, alpha / (math.sqrt(rank) if config.use_rslora else rank)))
    for field, pattern in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if idle := [key for key in pattern if key not in used[field]]:
            warnings.append(f"{field}: {listed(idle)} decides for no layer.")
    return scaled


def compile_pattern(field: str, keys: Collection[str]) -> Callable[[str], str | None]:
    """A function from a module's name to the first of `keys` that matches it.

    peft matches with `re.match(rf"(.*\\.)?({key})$", name)`. Served are keys without operators, in which "."
    stands for any one character, as it does there; a leading "^" ties the key to the start of the name.
    """
    if len(keys) > _PATTERN_LIMIT:
        raise _wrong(field, f"{len(keys)} entries", f"the limit is {_PATTERN_LIMIT}")
    compiled = []
    for key in keys:
        if not re.fullmatch(r"\^?([\w.-]|\\\.)+\$?", key, re.ASCII):
            raise _wrong(field, key, "regular expressions are not served; write full module names")
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


def _shapes(config: Honoured, sites: Iterable[_Scaled]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for site, rank, _ in sites:
        shapes[f"{PREFIX}{site.name}.lora_A.weight"] = (rank, site.in_features)
        shapes[f"{PREFIX}{site.name}.lora_B.weight"] = (site.out_features, rank)
        if config.lora_bias:
            shapes[f"{PREFIX}{site.name}.lora_B.bias"] = (site.out_features,)
    return shapes


def _read(checkpoint: Checkpoint, item: _Scaled, lora_bias: bool) -> SiteProgram:
    key = f"{PREFIX}{item.site.name}"
    b = checkpoint.read(f"{key}.lora_B.weight").t().contiguous().mul_(item.scale)
    bias = checkpoint.read(f"{key}.lora_B.bias").mul_(item.scale) if lora_bias else None
    if not (b.isfinite().all() and (bias is None or bias.isfinite().all())):
        raise _wrong("lora_alpha", item.scale, f"with this scale the values of {item.site.name} overflow")
    return SiteProgram(a=checkpoint.read(f"{key}.lora_A.weight").contiguous(), b=b, bias=bias)


def _explain(key: str, base: Base) -> str:
    """Why a tensor that the config does not name is refused."""
    module, _, part = key.removeprefix(PREFIX).partition(".lora_")
    if not key.startswith(PREFIX):
        return f"PEFT's keys begin with {PREFIX!r}"
    if part.startswith("embedding"):
        return "LoRA on the embedding is not served"
    if part.startswith("magnitude"):
        return "DoRA is not served"
    if re.fullmatch(r"[AB]\.[^.]+\.(weight|bias)", part):
        return "the key holds an adapter's name; save with PEFT's save_pretrained, which removes it"
    if part not in ("A.weight", "B.weight", "B.bias"):
        return "it is no tensor of a plain LoRA, and an adapter cannot replace the base's own"
    if module not in base.sites:
        return f"the base has no linear layer {shown(module)}"
    if part == "B.bias":
        return "lora_bias is false"
    return "target_modules, exclude_modules and layers_to_transform leave this layer out"
