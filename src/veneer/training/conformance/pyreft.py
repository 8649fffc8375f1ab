"""pyreft's interventions, restated in torch, and its files: the reference of cases in cases_adapterhub.py.

pyreft needs an older transformers than the one that serves here, as AdapterHub's library does. The classes follow
its source and have its tensors; tests/training compares them with numbers that pyreft itself computed.
https://github.com/stanfordnlp/pyreft/blob/v0.1.0/pyreft/interventions.py
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from veneer.training.conformance.adapterhub import activation, parameter

BUFFERS = ("embed_dim", "interchange_dim")  # sizes that pyreft saves beside the tensors


class Ends(NamedTuple):
    """Where interventions act: pyreft's "f<first>+l<last>". With two in a layer, each end has its own."""

    layers: Sequence[int]
    first: int
    last: int


class Rotation(nn.Module):
    """LowRankRotateLayer."""

    def __init__(self, size: int, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, rank))
        nn.init.orthogonal_(self.weight)


class Intervention(nn.Module):
    """Of one kind: Loreft, Noreft, Consreft, Lobireft, Direft or Nodireft."""

    def __init__(self, kind: str, size: int, rank: int, act_fn: str | None = None) -> None:
        super().__init__()
        self.kind, self.act_fn = kind, activation(act_fn)
        if kind in ("Noreft", "Nodireft"):
            self.proj_layer = nn.Linear(size, rank)
        else:
            self.rotate_layer: Any = nn.utils.parametrizations.orthogonal(Rotation(size, rank))
        constant = kind in ("Consreft", "Lobireft")
        self.learned_source: Any = parameter(rank) if constant else nn.Linear(size, rank)

    def forward(self, base: torch.Tensor) -> torch.Tensor:
        if self.kind in ("Noreft", "Nodireft"):
            source = self.act_fn(self.learned_source(base))
            source = source - self.proj_layer(base) if self.kind == "Noreft" else source
            return base + source @ self.proj_layer.weight
        rotation: torch.Tensor = self.rotate_layer.weight
        match self.kind:
            case "Loreft":
                source = self.act_fn(self.learned_source(base)) - base @ rotation
            case "Consreft":
                source = self.learned_source - base @ rotation
            case "Lobireft":
                source = self.learned_source
            case _:
                source = self.act_fn(self.learned_source(base))
        return base + source @ rotation.T

    def saved(self) -> dict[str, torch.Tensor]:
        """What pyreft's `state_dict` has."""
        if self.kind != "Loreft":
            return {key: value.detach().clone() for key, value in self.state_dict().items()}
        source = {key: value.detach().clone() for key, value in self.learned_source.state_dict().items()}
        return source | {"rotate_layer": self.rotate_layer.weight.detach().clone()}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        if self.kind != "Loreft":
            self.load_state_dict({key: value for key, value in tensors.items() if key not in BUFFERS})
            return
        self.learned_source.load_state_dict({key: tensors[key] for key in ("weight", "bias")})
        # As pyreft does: columns that are orthonormal are their own parametrization.
        made = nn.utils.parametrizations.orthogonal(Rotation(*tensors["rotate_layer"].shape))
        made.parametrizations.weight[0].base[:, : tensors["rotate_layer"].shape[1]] = tensors["rotate_layer"]  # type: ignore[index, union-attr]
        self.rotate_layer = made


def add_interventions(model: Any, kind: str, ends: Ends, rank: int, act_fn: str | None = None) -> Any:
    """Hang interventions behind a Llama's layers, as `model.interventions` in pyreft's order."""
    model.requires_grad_(False)
    size = model.config.hidden_size
    model.interventions = nn.ModuleList([Intervention(kind, size, rank, act_fn) for _ in ends.layers])
    half, own = len(ends.layers) // 2, len(set(ends.layers)) < len(ends.layers)
    for index, layer in enumerate(ends.layers):
        first = ends.first if not own or index < half else 0
        last = ends.last if not own or index >= half else 0

        def hook(
            _: Any, __: Any, h: torch.Tensor, at: int = index, f: int = first, n: int = last
        ) -> torch.Tensor:
            out, prompt = h.clone(), model.prompt_length
            out[:, :f] = model.interventions[at](h[:, :f])
            out[:, prompt - n : prompt] = model.interventions[at](h[:, prompt - n : prompt])
            return out

        model.model.layers[layer].register_forward_hook(hook)
    return model


def save_interventions(model: Any, folder: Path, kind: str, layers: Sequence[int]) -> None:
    """As pyreft's `ReftModel.save` does."""
    folder.mkdir(parents=True)
    keys = [
        f"layer_{layer}_comp_block_output_unit_pos_nunit_1#{layers[:at].count(layer)}"
        for at, layer in enumerate(layers)
    ]
    for key, intervention in zip(keys, model.interventions, strict=True):
        torch.save(intervention.saved(), folder / f"intkey_{key}.bin")
    config = {
        "intervention_types": [f"<class 'pyreft.interventions.{kind}Intervention'>"] * len(layers),
        "mode": "parallel",
        "representations": [[layer, "block_output", "pos", 1, None, *[None] * 9] for layer in layers],
        "sorted_keys": keys,
    }
    (folder / "config.json").write_text(json.dumps(config))


def load_interventions(model: Any, folder: Path) -> Any:
    """Fill the interventions of a model from a folder of pyreft's."""
    keys = json.loads((folder / "config.json").read_text())["sorted_keys"]
    for key, intervention in zip(keys, model.interventions, strict=True):
        intervention.load(torch.load(folder / f"intkey_{key}.bin", weights_only=True))
    return model
