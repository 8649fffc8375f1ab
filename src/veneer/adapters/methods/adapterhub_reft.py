"""AdapterHub's ReFT: on the first and the last tokens of a prompt, a layer's output h becomes

    LoReFT, NoReFT    h + Rᵀ (phi(W h + b) - R h)         LoReFT's R has orthonormal rows
    DiReFT            h + Rᵀ phi(W h + b)

The library forgets `subtract_projection` when it saves, so the files of NoReFT and DiReFT are the same: it must be
in the config. What is generated stays as it is, as in the library's forward pass over a prompt.
https://arxiv.org/abs/2404.03592, https://github.com/adapter-hub/adapters/blob/v1.3.0/src/adapters/methods/reft.py

Keys are `model.layers.<n>.reft_layer.refts.<name>.units.{0,1}.` and `learned_source.{weight,bias}` [r, hidden] and
[r], `projection.weight` [r, hidden]; of LoReFT `projection.parametrizations.weight.original` [r, hidden] and
`….0.base` [hidden, hidden]. Unit 0 acts on the first tokens and 1 on the last, or 0 on both with `tied_weights`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
import torch

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods.adapterhub import LIBRARY, File, activation_kind, read
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.bottleneck import hidden_site
from veneer.adapters.methods.common import Refusal, read_fields, wrong
from veneer.adapters.methods.interventions import Intervention, lower_intervention, rank_of
from veneer.adapters.program import Program, SiteProgram
from veneer.adapters.reach import Span

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]


class Honoured(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that decide what the adapter computes."""

    architecture: Literal["reft"]
    layers: Literal["all"] | list[int]
    prefix_positions: Count
    suffix_positions: Count
    r: int
    orthogonality: bool
    tied_weights: bool = False
    non_linearity: str | None = None
    subtract_projection: bool | None = None  # None: the library has not written it


class TrainingOnly(msgspec.Struct, frozen=True, kw_only=True):
    """Fields without effect on inference."""

    dropout: float = 0.05
    dtype: str | None = None
    init_weights_seed: int | None = None


REFUSED: Mapping[str, Refusal] = {"output_reft": Refusal((True,), "without it the adapter is nowhere")}


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower AdapterHub's ReFT. See `veneer.adapters.methods.base.Method`."""
    file = read(checkpoint, base)
    config = read_fields(file.fields, Honoured, TrainingOnly, REFUSED, "ReftConfig", LIBRARY)
    subtract = _subtract(file, config)
    kind = activation_kind(file, config.non_linearity)
    if (needed := rank_of(config.r, kind, subtract)) > max_rank or config.r < 1:
        rule = f"it needs rank {needed}, which must be from 1 to {max_rank} (--max-lora-rank)"
        raise wrong("r", config.r, rule)
    if config.orthogonality and config.r >= base.hidden_size:
        raise wrong("r", config.r, f"with orthogonality it must be below the hidden size {base.hidden_size}")
    layers = _layers(file, config)
    units = 1 if config.tied_weights else 2
    file.require(
        {
            key: shape
            for layer in layers
            for unit in range(units)
            for key, shape in _shapes(file, config, layer, unit)
        }
    )

    def lowered(unit: int) -> dict[str, SiteProgram]:
        found = {}
        for layer in layers:
            site = hidden_site(base, layer, "block", "output")
            found[site.name] = lower_intervention(site, _unit(file, config, layer, unit), kind, subtract)
        return found

    first, last = config.prefix_positions, config.suffix_positions
    if not first + last:
        raise wrong("prefix_positions", 0, "with suffix_positions = 0, too, the adapter acts on no token")
    has_tail = bool(first and last and not config.tied_weights)
    return Program(
        kind="adapterhub_"
        + ("noreft" if subtract and not config.orthogonality else "loreft" if subtract else "direft"),
        sites=lowered(0 if first or config.tied_weights else 1),
        tail=lowered(1) if has_tail else {},
        span=Span(first, last, has_tail),
        base_model=file.base_model,
        warnings=tuple(file.warnings),
    )


def _subtract(file: File, config: Honoured) -> bool:
    if config.subtract_projection is not None:
        return config.subtract_projection
    if not config.orthogonality:
        raise wrong(
            "subtract_projection",
            None,
            "the library leaves it out, so NoReFT and DiReFT have the same files. Add it to the method's config, "
            "true for NoReFT and false for DiReFT, or let `veneer adapters convert FOLDER --kind noreft|direft "
            "--output OUT` do that",
        )
    file.warnings.append(
        "The config has no subtract_projection, so this is served as LoReFT, which is what the library makes of "
        "it. If it was trained as DiReFT with orthogonality, add subtract_projection = false to the config."
    )
    return True


def _layers(file: File, config: Honoured) -> list[int]:
    if config.layers == "all":
        return file.layers()
    layers = sorted({layer for layer in config.layers if 0 <= layer < file.base.num_layers})
    if not layers or len(layers) < len(set(config.layers)):
        raise wrong(
            "layers", config.layers, f"they must be from 0 to {file.base.num_layers - 1}, one at least"
        )
    return layers


def _key(file: File, layer: int, unit: int, rest: str) -> str:
    return file.key(f"model.layers.{layer}.reft_layer", "refts", f"units.{unit}.{rest}")


_PROJECTION = "projection.parametrizations.weight."


def _shapes(file: File, config: Honoured, layer: int, unit: int) -> list[tuple[str, tuple[int, ...]]]:
    rank, hidden = config.r, file.base.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "learned_source.weight": (rank, hidden),
        "learned_source.bias": (rank,),
    }
    if config.orthogonality:
        shapes |= {f"{_PROJECTION}original": (rank, hidden), f"{_PROJECTION}0.base": (hidden, hidden)}
    else:
        shapes["projection.weight"] = (rank, hidden)
    return [(_key(file, layer, unit, name), shape) for name, shape in shapes.items()]


def _unit(file: File, config: Honoured, layer: int, unit: int) -> Intervention:
    def get(rest: str) -> torch.Tensor:
        return file.checkpoint.read(_key(file, layer, unit, rest))

    if config.orthogonality:
        projection = orthogonal(get(f"{_PROJECTION}original"), get(f"{_PROJECTION}0.base"))
    else:
        projection = get("projection.weight")
    return Intervention(get("learned_source.weight"), get("learned_source.bias"), projection)


def orthogonal(original: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """What torch.nn.utils.parametrizations.orthogonal makes of its tensors for a weight [r, n] with r < n.

    The product of Householder reflections, each column with the sign that stands on the diagonal as a whole number.
    """
    x = original.T
    a = x.tril(diagonal=-1)
    q = torch.linalg.householder_product(a, 2 / (1 + (a * a).sum(0)))
    found: torch.Tensor = (base @ (q * x.diagonal().int())).T
    return found
