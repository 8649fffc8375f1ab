"""Low-rank interventions on a hidden state, h + Rᵀ (phi(W h + b) - R h), as primitives (ReFT).

Without phi this is low rank with A = W - R. With phi, - R h has ranks of its own: phi(y) - phi(-y) is y for ReLU,
SiLU and both GELUs (y·(Φ(y) + Φ(-y)) = y), and 1.01 y for the leaky ReLU with slope 0.01.
https://arxiv.org/abs/2404.03592
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from veneer.adapters.methods.bottleneck import Bottleneck, lower_bottleneck
from veneer.adapters.methods.common import wrong
from veneer.adapters.program import Site, SiteProgram

_ODD_PART: Mapping[str, float] = {"relu": 1.0, "silu": 1.0, "gelu": 1.0, "gelu_tanh": 1.0, "leaky_relu": 1.01}


class Intervention(NamedTuple):
    """Tensors of one intervention."""

    source: torch.Tensor  # W [r, hidden]
    bias: torch.Tensor | None  # b [r]
    projection: torch.Tensor  # R [r, hidden]


def rank_of(r: int, kind: str, subtract: bool) -> int:
    """The rank of the product that it becomes; `kind` "" is no activation."""
    return 3 * r if kind and subtract else r


def as_bottleneck(tensors: Intervention, kind: str, subtract: bool) -> Bottleneck:
    """The same as U phi(D h + d). Raises `AdapterRefused` where phi does not let - R h through."""
    source, bias, projection = tensors
    if not subtract:
        return Bottleneck(source, bias, projection.T, None)
    if not kind:
        return Bottleneck(source - projection, bias, projection.T, None)
    if kind not in _ODD_PART:
        rule = f"together with the subtracted projection it is served only as {', '.join(_ODD_PART)} or none"
        raise wrong("non_linearity", kind, rule)
    odd = projection / _ODD_PART[kind]
    inner = None if bias is None else torch.cat([bias, bias.new_zeros(2 * len(bias))])
    return Bottleneck(
        torch.cat([source, projection, -projection]), inner, torch.cat([projection, -odd, odd]).T, None
    )


def lower_intervention(site: Site, tensors: Intervention, kind: str, subtract: bool) -> SiteProgram:
    return lower_bottleneck(site, as_bottleneck(tensors, kind, subtract), kind)
