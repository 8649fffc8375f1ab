"""What the methods of AdapterHub's library have in common: its config file, its keys, its names of activations.

`adapter_config.json` holds the method's config in its field "config"; keys are `model.<module>.<kind>.<name>.…`
with the adapter's own name in them. Read as adapters 1.3.0 writes them for Llama-like models.
https://github.com/adapter-hub/adapters/tree/v1.3.0/src/adapters
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import msgspec
import torch

from veneer.adapters.checkpoint import Checkpoint, listed, shown
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.common import Refusal, read_fields, wrong
from veneer.adapters.names import CONFIG_FILE, HEAD_ADVICE
from veneer.adapters.program import HEAD
from veneer.errors import AdapterRefused

LIBRARY = "adapters 1.3"
GATED = Refusal(
    (False,), "its gate is a mean over the whole sequence, so later tokens would change earlier ones"
)
_HEAD_KEY = f"{HEAD}.weight"
_RENAMED = {"gelu": "gelu_new", "gelu_orig": "gelu"}  # names of before the version was written into the file
_ARCHITECTURES = {
    None: "ADAPTERHUB_BOTTLENECK",
    "lora": "ADAPTERHUB_LORA",
    "prefix_tuning": "ADAPTERHUB_PREFIX_TUNING",
    "reft": "ADAPTERHUB_REFT",
}
_REFUSED = {
    "mtl_lora": "a request would have to name a task for each of its rows",
    "prompt_tuning": "the library has it for no decoder that is served here",
    "union": "a file with several methods is not served; save each by itself",
}


class _File(msgspec.Struct, frozen=True, kw_only=True):
    """The fields around the method's own config."""

    config: dict[str, Any]
    name: str
    hidden_size: int | None = None
    version: str | None = None


class _Unread(msgspec.Struct, frozen=True, kw_only=True):
    """Where the adapter comes from."""

    config_id: str | None = None
    label2id: dict[str, Any] | None = None
    model_class: str | None = None
    model_name: str | None = None
    model_type: str | None = None
    type: str | None = None


class File(NamedTuple):
    """An adapter's file, read up to the method's own config."""

    checkpoint: Checkpoint
    base: Base
    config: Mapping[str, Any]  # the whole file
    name: str
    fields: Mapping[str, Any]  # the method's own config
    version: tuple[int, int] | None  # of the library that wrote it
    prefix: str  # of all keys: "model." or ""
    warnings: list[str]
    base_model: str

    def key(self, module: str, part: str, rest: str) -> str:
        """The key of a tensor: `module` as the base calls it, e.g. "model.layers.0", "loras", "lora_A"."""
        return f"{self.prefix}{module.removeprefix('model.')}{'.' if module else ''}{part}.{self.name}.{rest}"

    def layers(self, leave_out: Iterable[int] = ()) -> list[int]:
        left = set(leave_out)
        return [layer for layer in range(self.base.num_layers) if layer not in left]

    def require(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse the file unless it holds exactly these tensors, beside the head that is still the base's."""
        wanted = dict(shapes)
        has_head = _HEAD_KEY in self.checkpoint.header
        if has_head:
            wanted[_HEAD_KEY] = (self.base.sites[HEAD].out_features, self.base.hidden_size)
        self.checkpoint.require(wanted, _explain)
        if has_head:
            _check_head(self.checkpoint, self.base)
        else:
            self.warnings.append(
                f"The file has no {_HEAD_KEY}, so the base's output head is used. {HEAD_ADVICE}."
            )


def kind_of(config: Mapping[str, Any]) -> str | None:
    """The kind, as registry.py names it, of a config that AdapterHub's library wrote; None of any other.

    Raises:
        AdapterRefused: its method is not served.
    """
    fields = config.get("config")
    if "peft_type" in config or not isinstance(fields, Mapping):
        return None
    architecture = fields.get("architecture")
    if isinstance(architecture, str | None) and architecture in _ARCHITECTURES:
        return _ARCHITECTURES[architecture]
    reason = _REFUSED.get(architecture) if isinstance(architecture, str) else None
    served = ", ".join(map(shown, _ARCHITECTURES))
    raise wrong("architecture", architecture, f"{reason or 'it is not known'}. Served: {served}")


def read(checkpoint: Checkpoint, base: Base, config: Mapping[str, Any] | None = None) -> File:
    """The config up to the method's own fields; `config` instead of the checkpoint's, if there are several.

    Raises:
        AdapterRefused: a field is unknown or of a wrong type, or the adapter is for a base of another size.
    """
    config = checkpoint.config if config is None else config
    found = read_fields(config, _File, _Unread, {}, "adapter_config.json", LIBRARY)
    if found.hidden_size not in (None, base.hidden_size):
        rule = f"the base that is served here has {base.hidden_size}; train on this base"
        raise wrong("hidden_size", found.hidden_size, rule)
    if not found.name or "." in found.name:
        raise wrong(
            "name", found.name, "it stands in the keys of the file, so it must be there and have no dot"
        )
    prefix = "model." if any(key.startswith("model.") for key in checkpoint.header) else ""
    model_name = config.get("model_name")
    return File(
        checkpoint,
        base,
        config,
        found.name,
        found.config,
        _version(found.version),
        prefix,
        [],
        model_name if isinstance(model_name, str) else "",
    )


def _version(text: str | None) -> tuple[int, int] | None:
    match = re.match(r"adapters\.(\d{1,4})\.(\d{1,4})", text or "", re.ASCII)
    return (int(match[1]), int(match[2])) if match else None


def _explain(key: str) -> str:
    if key.startswith("invertible_adapters") or ".invertible_adapters." in key:
        return "invertible adapters change the embeddings of all tokens and are not served"
    if ".pool.prefix_tunings." in key:
        return "it is a second name of the same tensor; `veneer adapters convert FOLDER --output OUT` leaves it out"
    return "the config asks for no such tensor, and an adapter cannot replace the base's own"


def _check_head(checkpoint: Checkpoint, base: Base) -> None:
    """The head in the file must be the one that is served, up to the rounding of its type."""
    saved, served = checkpoint.read(_HEAD_KEY), base.weight(HEAD)
    rounded = (saved, saved.bfloat16().float(), saved.half().float())
    if not any(torch.equal(each, served) for each in rounded):
        raise AdapterRefused(
            f"{_HEAD_KEY} in the file differs from the head that is served here by up to "
            f"{float((saved - served).abs().max()):.3g}: it was trained with the adapter, or is that of another "
            "base. Train with the head frozen (model.lm_head.requires_grad_(False)), or leave it out of the file "
            "if it was not trained."
        )


# ---- activations -----------------------------------------------------------------------------------

# By the names of transformers' ACT2FN and "leakyrelu"; other names of one function differ by rounding alone.
_KINDS: Mapping[str, str] = {
    "gelu": "gelu",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_python": "gelu",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "leaky_relu": "leaky_relu",
    "leakyrelu": "leaky_relu",
    "linear": "",
    "relu": "relu",
    "sigmoid": "sigmoid",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}


def activation_kind(file: File, name: str | None) -> str:
    """The elementwise kind of `program.Activation` that a config's `non_linearity` is, "" for the identity."""
    if name is None:
        return ""
    plain = name.lower()
    if "version" not in file.config:
        plain = _RENAMED.get(plain, plain)
    if plain not in _KINDS:
        raise wrong("non_linearity", name, f"served are {', '.join(_KINDS)}")
    return _KINDS[plain]


def no_site(names: Iterable[str]) -> AdapterRefused:
    return AdapterRefused(
        f"{CONFIG_FILE}: the base has no layer {listed(names)}, which the config asks for. Served are bases whose "
        "layers have the names of Llama's."
    )
