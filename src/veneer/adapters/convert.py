"""Turns a PiSSA, OLoRA or KaSA adapter into a plain LoRA, given the weights that its training started from.

These three take a part T of each weight W out of the base before training, W' = W - T, and the file of the
adapter does not say which. On the base as it was, the adapter is therefore W' - W + s·BA = s·BA - T. T is
rebuilt as PEFT 0.21 makes it, in float32, and has the rank r of the adapter:

    PiSSA   the r largest singular values of W with their vectors      https://arxiv.org/abs/2404.02948
    OLoRA   s·Q[:, :r] R[:r] with W = QR                                https://arxiv.org/abs/2406.01775
    KaSA    the r smallest singular values of W; BA is B diag A         https://arxiv.org/abs/2412.06071

With T = s·B0·A0 the result is a LoRA of rank 2r: A' = [A; A0], B' = [B, -B0], with the same scale s. T does not
depend on the signs of the vectors, which differ between libraries.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from veneer.adapters import registry
from veneer.adapters.checkpoint import Checkpoint, shown
from veneer.adapters.methods import lora_config
from veneer.adapters.methods.common import PREFIX, add_head_copy, per_site, wrong
from veneer.adapters.model_weights import Weights
from veneer.adapters.names import CONFIG_FILE, TEXT_FILES, WEIGHTS_FILE
from veneer.adapters.program import HEAD, Site
from veneer.adapters.staging import sync
from veneer.adapters.taken import DOUBT_LIMIT, TAKES, Taken
from veneer.errors import AdapterRefused, Conflict, StorageFull

_LIKENESS_LIMIT = 0.1  # cosine
_WITH_PEFT = (
    "Where the adapter as it was before training was saved, PEFT's save_pretrained(folder, "
    "path_initial_model_for_weight_conversion=...) converts it"
)
_LOST: Mapping[str, str] = {
    "corda": f"its start follows from calibration data, which no file holds. {_WITH_PEFT}",
    "lora_ga": f"its start follows from gradients of the training data, which no file holds. {_WITH_PEFT}",
    "loftq": "it was trained on a quantized remainder of the weights, and what that lost is not of low rank. "
    "Train again from PEFT's replace_lora_weights_loftq, which leaves the base as it is",
    "pissa_niter_": f"its start follows from random numbers, which no file holds. {_WITH_PEFT}",
}


class Converted(NamedTuple):
    """What was written."""

    ranks: tuple[int, ...]  # of each layer
    warnings: tuple[str, ...]


class Layer(NamedTuple):
    site: Site
    rank: int
    scale: float


def convert(folder: Path, weights: Path, output: Path) -> Converted:
    """Write the adapter in `folder` as a plain LoRA into the new folder `output`.

    Args:
        weights: folder of the very weights that the training loaded, in the dtype in which it held them.

    Raises:
        AdapterRefused: the adapter needs no conversion, cannot be converted, or does not fit the weights.
        Conflict: `output` exists.
        InvalidRequest: the weights are quantized or not readable.
    """
    check_free(output)
    checkpoint = Checkpoint(folder)
    kind, take = _kind(checkpoint.config)
    fields = _fields(checkpoint.config, kind)
    model = Weights(weights)
    warnings: list[str] = []
    layers = _layers(checkpoint, fields, model, kind, warnings)
    beside = _require(checkpoint, fields, layers, kind, warnings)
    if rounded := {model.dtype(layer.site.name) for layer in layers} - {"F32"}:
        warnings.append(
            f"the weights are {' and '.join(sorted(rounded))}: a training that held them so rounded what was left "
            "of them, too. The result lacks this rounding."
        )
    tensors = {key: checkpoint.read(key) for key in beside}
    doubtful, likeness = [], []
    for layer in tqdm(layers, desc="converting", unit="layer", disable=None):
        taken = take(model.read(layer.site.name), layer.rank, layer.scale)
        a, b = _factors(checkpoint, layer.site.name, kind)
        likeness.append(_cosine(a, b, taken))
        if taken.doubt > DOUBT_LIMIT:
            doubtful.append(layer.site.name)
        key = f"{PREFIX}{layer.site.name}"
        tensors[f"{key}.lora_A.weight"] = torch.cat([a, taken.a]).contiguous()
        tensors[f"{key}.lora_B.weight"] = torch.cat([b, -taken.b], dim=1).contiguous()
    warnings += _judge(kind, doubtful, likeness)
    write(output, _plain(checkpoint.config), tensors, texts=folder)
    return Converted(tuple(2 * layer.rank for layer in layers), tuple(warnings))


# ---- checks ---------------------------------------------------------------------------------------


def check_free(output: Path) -> None:
    if output.exists() or output.is_symlink():
        raise Conflict(f"{str(output)!r} exists and is not overwritten; name a new folder.")


def _kind(config: Mapping[str, Any]) -> tuple[str, Callable[[torch.Tensor, int, float], Taken]]:
    """PiSSA, OLoRA or KaSA, and how what it took out is rebuilt."""
    peft_type, start = config.get("peft_type"), config.get("init_lora_weights", True)
    if isinstance(peft_type, str) and peft_type in registry.REFUSED:
        raise AdapterRefused(f"{shown(peft_type)} cannot be converted: {registry.REFUSED[peft_type]}.")
    if peft_type != "LORA":
        if peft_type in registry.METHODS:
            raise AdapterRefused(f"{shown(peft_type)} needs no conversion: upload the adapter as it is.")
        raise wrong("peft_type", peft_type, f"converted are {', '.join(TAKES)}, whose peft_type is LORA")
    for name, reason in _LOST.items():
        if isinstance(start, str) and start.startswith(name):
            raise wrong("init_lora_weights", start, f"it cannot be converted: {reason}")
    kind = {"pissa": "PiSSA", "olora": "OLoRA"}.get(start.lower() if isinstance(start, str) else "")
    if start not in lora_config.REFUSED["init_lora_weights"].off and not kind:
        raise wrong("init_lora_weights", start, "PEFT 0.21 has no such initialisation")
    if config.get("kasa_config") is not None:
        if kind:
            raise wrong("init_lora_weights", start, "with kasa_config it must be true: each changes the base")
        kind = "KaSA"
    if kind is None:
        raise AdapterRefused(
            "This LoRA needs no conversion: its training left the base as it was. Upload it."
        )
    return kind, TAKES[kind]


def _fields(config: Mapping[str, Any], kind: str) -> lora_config.Honoured:
    """The fields that count, read as of the plain LoRA that the adapter becomes."""
    rest = {key: value for key, value in config.items() if key not in ("init_lora_weights", "kasa_config")}
    fields = lora_config.read_config(rest)
    # DoRA's norm is that of the whole weight, W' + s·BA, which the conversion leaves as it is.
    for name in lora_config.VARIANTS:
        if getattr(fields, name) not in (None, False) and (name != "use_dora" or kind == "KaSA"):
            raise wrong(name, config[name], f"together with {kind} it is not converted")
    return fields


def _layers(
    checkpoint: Checkpoint, fields: lora_config.Honoured, model: Weights, kind: str, warnings: list[str]
) -> list[Layer]:
    """The layers of the file, each with its rank and scale."""
    suffix = ".lora_A.weight"
    names = [
        key.removeprefix(PREFIX).removesuffix(suffix) for key in checkpoint.header if key.endswith(suffix)
    ]
    if not names:
        raise AdapterRefused(f"{WEIGHTS_FILE} has no tensor *{suffix}, so there is nothing to convert.")
    if HEAD in names and model.shares_head:
        raise AdapterRefused(
            f"{HEAD} is also the embedding of this model, so training took a part out of the embedding, too. No "
            "LoRA can give that back; train again without the head."
        )
    for name in names:
        if name not in model.sites:
            raise AdapterRefused(
                f"{WEIGHTS_FILE}: the weights have no matrix {shown(f'{name}.weight')}, which the adapter changes. "
                "Give the model that it was trained on."
            )
    sites = [model.sites[name] for name in names]
    ranks = per_site(sites, "rank_pattern", fields.rank_pattern, fields.r, warnings)
    alphas = per_site(sites, "alpha_pattern", fields.alpha_pattern, fields.lora_alpha, warnings)
    layers = []
    for site, rank, alpha in zip(sites, ranks, alphas, strict=True):
        limit = min(site.in_features, site.out_features) - (kind == "KaSA")
        if not 1 <= rank <= limit:
            raise wrong("r or rank_pattern", rank, f"{kind} needs a rank from 1 to {limit} at {site.name}")
        scale = alpha / (math.sqrt(rank) if fields.use_rslora else rank)
        if not 0 < scale < math.inf:
            raise wrong("lora_alpha or alpha_pattern", alpha, f"it must be above 0 at {site.name}")
        layers.append(Layer(site, rank, scale))
    return layers


def _require(
    checkpoint: Checkpoint, fields: lora_config.Honoured, layers: list[Layer], kind: str, warnings: list[str]
) -> list[str]:
    """Check every tensor's shape; the names of those that stay as they are."""
    shapes: dict[str, tuple[int, ...]] = {}
    beside = []
    for site, rank, _ in layers:
        key = f"{PREFIX}{site.name}"
        shapes[f"{key}.lora_A.weight"] = (rank, site.in_features)
        shapes[f"{key}.lora_B.weight"] = (site.out_features, rank)
        if kind == "KaSA":
            shapes[f"{key}.lora_diag"] = (rank,)
        if fields.use_dora:
            beside.append(f"{key}.lora_magnitude_vector")
            shapes[beside[-1]] = (site.out_features,)
    if fields.bias != "none" or fields.lora_bias:
        biases = {key: info.shape for key, info in checkpoint.header.items() if key.endswith(".bias")}
        beside += biases
        shapes |= biases
    add_head_copy(shapes, checkpoint.header, [layer.site for layer in layers], warnings)
    checkpoint.require(shapes)
    return beside


def _factors(checkpoint: Checkpoint, site: str, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, in] and B [out, rank] as they were trained."""
    key = f"{PREFIX}{site}"
    a, b = checkpoint.read(f"{key}.lora_A.weight"), checkpoint.read(f"{key}.lora_B.weight")
    if kind == "KaSA":
        a *= checkpoint.read(f"{key}.lora_diag")[:, None]
    return a, b


def _cosine(a: torch.Tensor, b: torch.Tensor, taken: Taken) -> float:
    """The cosine between ba and what was taken out, as matrices."""
    inner = ((b.T @ taken.b) * (a @ taken.a.T)).sum()
    norms = ((b.T @ b) * (a @ a.T)).sum() * ((taken.b.T @ taken.b) * (taken.a @ taken.a.T)).sum()
    return float(inner / norms.sqrt()) if norms > 0 else 0.0


def _judge(kind: str, doubtful: list[str], likeness: list[float]) -> list[str]:
    """Warnings about what only the user can know."""
    warnings = []
    if doubtful:
        warnings.append(
            f"at {len(doubtful)} layers, first {doubtful[0]}, float32 hardly tells what was taken out from what "
            "was left. If the training ran on another device or library, it may have taken out another part."
        )
    if kind != "KaSA" and (mean := sum(likeness) / len(likeness)) < _LIKENESS_LIMIT:
        warnings.append(
            f"the adapter is not like what {kind} starts from with these weights (mean cosine {mean:.2f}). The "
            "result is wrong unless they are the very weights that the training loaded."
        )
    return warnings


# ---- the result -----------------------------------------------------------------------------------


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the result: ranks are doubled, and alphas grow so that α/r or α/√r stays."""
    growth = math.sqrt(2) if config.get("use_rslora") else 2
    plain = dict(config) | {"init_lora_weights": True}
    plain |= {"r": 2 * config.get("r", 8), "lora_alpha": growth * config.get("lora_alpha", 8)}
    for name, factor in (("rank_pattern", 2), ("alpha_pattern", growth)):
        if pattern := config.get(name):
            plain[name] = {key: factor * value for key, value in pattern.items()}
    if "kasa_config" in plain:
        plain["kasa_config"] = None
    return plain


def write(
    output: Path, config: Mapping[str, Any], tensors: dict[str, torch.Tensor], *, texts: Path | None = None
) -> None:
    """The files, and those of the tokenizer in `texts`; under the final name only when they are complete."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        partial.mkdir()
        save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        (partial / WEIGHTS_FILE).chmod(0o644)  # safetensors writes 0600
        (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        for name in TEXT_FILES:
            if texts is not None and (texts / name).is_file():
                shutil.copyfile(texts / name, partial / name)
        for path in (*partial.iterdir(), partial):
            sync(path)
        check_free(output)
        partial.rename(output)
        sync(output.parent)
    except (OSError, SafetensorError) as error:
        raise StorageFull(f"{str(output)!r} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
