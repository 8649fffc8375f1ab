"""Turns what pyreft saves into bottlenecks in our own format (methods/bottleneck.py).

A folder of pyreft has `config.json`, which lists the interventions, and a pickle `intkey_<key>.bin` for each. Where
they act is in neither: pyreft takes the positions with each call, as first and last tokens of the prompt. With one
intervention in a layer both ends use it; with two, the first half of the list is for the first tokens and the
second half for the last, as in pyreft's own data sets. Nothing of pyreft is imported, and no class by its name.
https://github.com/stanfordnlp/pyreft/blob/v0.1.0/pyreft/interventions.py, pyreft/dataset.py
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from veneer.adapters.checkpoint import listed, shown
from veneer.adapters.convert import check_free, write
from veneer.adapters.methods.adapterhub_reft import orthogonal
from veneer.adapters.methods.bottleneck import Bottleneck, Kind
from veneer.adapters.methods.interventions import Intervention, as_bottleneck
from veneer.adapters.repack import Repacked, Tensors, read_json, read_tensors
from veneer.errors import AdapterRefused, InvalidRequest

# A representation is saved as a list in this order.
_FIELDS = (
    *("layer", "component", "unit", "max_number_of_units", "low_rank_dimension", "intervention_type"),
    *("intervention", "subspace_partition", "group_key", "intervention_link_key", "moe_key"),
    *("source_representation", "hidden_source_representation", "latent_dim"),
)
_PATH = re.compile(r"model\.layers\[([0-9]{1,5})\]\.output", re.ASCII)


class _Found(NamedTuple):
    """One intervention of the folder."""

    layer: int
    tensors: Bottleneck


def is_pyreft(folder: Path) -> bool:
    """Whether pyreft has saved interventions there."""
    return (folder / "config.json").is_file() and any(folder.glob("intkey_*.bin"))


def repack_pyreft(
    folder: Path, output: Path, *, first: int = 0, last: int = 0, activation: str | None = None
) -> Repacked:
    """Write pyreft's interventions as an adapter of our own format.

    Args:
        first, last: the tokens of a prompt on which they act, pyreft's "f<first>+l<last>".
        activation: pyreft's `act_fn`, which is in no file.

    Raises:
        AdapterRefused: the folder holds something else, or what cannot be served exactly.
        InvalidRequest: the positions do not fit the interventions.
        Conflict: `output` exists.
    """
    check_free(output)
    if activation is not None and activation not in get_args(Kind):
        raise InvalidRequest(f"--activation {activation}: served are {', '.join(get_args(Kind))}")
    found = _interventions(folder, read_json(folder / "config.json"), activation or "")
    heads, tails = _ends(found, first, last)
    tensors: Tensors = {}
    for part, each in [*(("", one) for one in heads), *(("tail.", one) for one in tails)]:
        down, inner, up, outer = each.tensors
        at = f"layers.{each.layer}.block.{part}"
        tensors[f"{at}down.weight"], tensors[f"{at}up.weight"] = down, up
        tensors[f"{at}down.bias"] = down.new_zeros(down.shape[0]) if inner is None else inner
        tensors[f"{at}up.bias"] = up.new_zeros(up.shape[0]) if outer is None else outer
    ranks = {each.tensors.down.shape[0] for each in found}
    if len(ranks) > 1:
        raise AdapterRefused(
            f"the interventions in {str(folder)!r} have several ranks: {sorted(ranks)}; one is served."
        )
    config = {
        "peft_type": "BOTTLENECK",
        "rank": ranks.pop(),
        "places": ["block"],
        "layers": [each.layer for each in heads],
        "source": "output",
        "activation": activation,
        "bias": True,
        "positions": {"first": first, "last": last, "tail": bool(tails)},
    }
    contiguous = {key: value.float().contiguous() for key, value in tensors.items()}
    write(output, config, contiguous, texts=folder)
    notes = (
        ()
        if activation
        else ("act_fn is in none of pyreft's files; if there was one, give it as --activation.",)
    )
    return Repacked(f"{len(found)} interventions of pyreft", len(tensors), notes)


def _ends(found: Sequence[_Found], first: int, last: int) -> tuple[Sequence[_Found], Sequence[_Found]]:
    """The interventions for the first tokens, and those for the last if they have their own."""
    if first < 0 or last < 0 or not first + last:
        raise InvalidRequest(
            "pyreft's files do not say where the interventions act: give --first N, --last N or both, as in its "
            '"f<first>+l<last>"'
        )
    layers = [each.layer for each in found]
    if len(set(layers)) == len(layers):
        return found, ()
    half = len(found) // 2
    if not (first and last) or layers[:half] != layers[half:] or len(set(layers[:half])) < half:
        raise InvalidRequest(
            f"the interventions are in the layers {layers[:20]}: with two in a layer, the first half of the list "
            "must name each layer once and the second half the same ones, and both --first and --last are needed"
        )
    return found[:half], found[half:]


def _interventions(folder: Path, config: Mapping[str, Any], kind: str) -> list[_Found]:
    representations, types = config.get("representations"), config.get("intervention_types")
    keys = config.get("sorted_keys")
    lists = (representations, types, keys)
    if not all(isinstance(each, list) for each in lists) or len({len(each or []) for each in lists}) != 1:
        raise AdapterRefused(f"{str(folder / 'config.json')!r} lists no interventions as pyreft saves them.")
    if config.get("mode", "parallel") != "parallel":
        raise AdapterRefused(f"mode {shown(config['mode'])} of pyreft is not served; it must be 'parallel'.")
    found = []
    for representation, name, key in zip(representations or [], types or [], keys or [], strict=True):
        layer = _layer(representation)
        made = re.search(r"(\w+)Intervention'?>?$", str(name))
        make = _KINDS.get(made[1]) if made else None
        if make is None:
            raise AdapterRefused(
                f"the intervention {shown(name)} is not served; served are {', '.join(_KINDS)}."
            )
        if not re.fullmatch(r"[\w#\[\]]+", str(key), re.ASCII):
            raise AdapterRefused(f"the key {shown(key)} is none of pyreft's.")
        found.append(_Found(layer, make(_Saved(folder / f"intkey_{key}.bin"), kind)))
    if not found:
        raise AdapterRefused(f"{str(folder)!r} holds no intervention.")
    return found


def _layer(representation: Any) -> int:
    """The layer of a representation, which must be the output of a whole decoder layer at single positions."""
    if isinstance(representation, list):
        representation = dict(zip(_FIELDS, representation, strict=False))
    if not isinstance(representation, dict):
        raise AdapterRefused(f"the representation {shown(representation)} is none of pyreft's.")
    component = str(representation.get("component"))
    path = _PATH.fullmatch(component)
    layer = int(path[1]) if path else representation.get("layer")
    plain = {"unit": "pos", "max_number_of_units": 1}
    unset = (
        "subspace_partition",
        "group_key",
        "intervention_link_key",
        "moe_key",
        "hidden_source_representation",
    )
    others = [name for name in unset if representation.get(name)]
    others += [name for name, value in plain.items() if representation.get(name, value) != value]
    if not (path or component == "block_output") or not isinstance(layer, int) or others:
        what = others[0] if others else "component"
        raise AdapterRefused(
            f"{what} = {shown(representation.get(what))} of pyreft is not served: interventions must be at the "
            "output of whole layers (block_output), one position at a time, each by itself."
        )
    return layer


# ---- the kinds -------------------------------------------------------------------------------------


class _Saved:
    """The tensors of one intervention; each must be used."""

    def __init__(self, path: Path) -> None:
        self._path = path
        buffers = ("embed_dim", "interchange_dim")
        self._tensors = {key: value for key, value in read_tensors(path).items() if key not in buffers}

    def take(self, *names: str) -> list[torch.Tensor]:
        """These tensors in float32. Raises `AdapterRefused` unless they are all that there are."""
        if set(names) != self._tensors.keys():
            raise AdapterRefused(f"{str(self._path)!r} has {listed(self._tensors)}, not {listed(names)}.")
        found = [self._tensors[name].float() for name in names]
        if not all(each.isfinite().all() for each in found):
            raise AdapterRefused(f"{str(self._path)!r} holds NaN or infinite values.")
        return found

    def has(self, name: str) -> bool:
        return name in self._tensors

    def rotation(self, *others: str) -> list[torch.Tensor]:
        """R [r, hidden] with orthonormal rows, which is saved as its parametrization, and the other tensors."""
        at = "rotate_layer.parametrizations.weight."
        original, base, *rest = self.take(f"{at}original", f"{at}0.base", *others)
        return [orthogonal(original.T, base), *rest]


def _without_activation(name: str, kind: str) -> None:
    if kind:
        raise InvalidRequest(f"--activation {kind}: {name} has none; leave it out")


_SOURCE = ("learned_source.weight", "learned_source.bias")


def _loreft(saved: _Saved, kind: str) -> Bottleneck:
    """h + Rᵀ (phi(W h + b) - R h)"""
    source, bias, rotation = saved.take("weight", "bias", "rotate_layer")
    return as_bottleneck(Intervention(source, bias, rotation.T), kind, subtract=True)


def _noreft(saved: _Saved, kind: str) -> Bottleneck:
    """h + Vᵀ (phi(W h + b) - V h - c)"""
    names = ("proj_layer.weight", *_SOURCE, *["proj_layer.bias"] * saved.has("proj_layer.bias"))
    projection, source, bias, *constant = saved.take(*names)
    made = as_bottleneck(Intervention(source, bias, projection), kind, subtract=True)
    return made._replace(up_bias=-(constant[0] @ projection)) if constant else made


def _consreft(saved: _Saved, kind: str) -> Bottleneck:
    """h + Rᵀ (b - R h)"""
    _without_activation("ConsReFT", kind)
    rotation, bias = saved.rotation("learned_source")
    return Bottleneck(-rotation, bias, rotation.T, None)


def _lobireft(saved: _Saved, kind: str) -> Bottleneck:
    """h + Rᵀ b"""
    _without_activation("LobiReFT", kind)
    rotation, bias = saved.rotation("learned_source")
    return Bottleneck(torch.zeros_like(rotation), bias, rotation.T, None)


def _direft(saved: _Saved, kind: str) -> Bottleneck:
    """h + Rᵀ phi(W h + b)"""
    rotation, source, bias = saved.rotation(*_SOURCE)
    return as_bottleneck(Intervention(source, bias, rotation), kind, subtract=False)


def _nodireft(saved: _Saved, kind: str) -> Bottleneck:
    """h + Vᵀ phi(W h + b); the bias of V is not used."""
    names = ("proj_layer.weight", *_SOURCE, *["proj_layer.bias"] * saved.has("proj_layer.bias"))
    projection, source, bias, *_ = saved.take(*names)
    return as_bottleneck(Intervention(source, bias, projection), kind, subtract=False)


_KINDS: Mapping[str, Callable[[_Saved, str], Bottleneck]] = {
    "Loreft": _loreft,
    "Noreft": _noreft,
    "Consreft": _consreft,
    "Lobireft": _lobireft,
    "Direft": _direft,
    "Nodireft": _nodireft,
}
