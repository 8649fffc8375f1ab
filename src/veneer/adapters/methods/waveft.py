"""PEFT's WAVEFT: ΔW = s times the inverse wavelet transform, of one level, of a matrix with few entries.

Their positions follow from random_loc_seed; the file has the entries alone. With use_idwt=False they are ΔW's own.
The matrix holds four bands [n, m] of coefficients: approximation, horizontal, vertical, diagonal. Along an axis,
a low and a high band give out[2 i + k] = Σ_i low[i] f[k] + high[i] g[k]; the edges beyond the site are cut off.
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/waveft/layer.py, waverec2d.py

Keys are `base_model.model.<module>.waveft_spectrum` [n_frequency of the module].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.changes import sparse_change
from veneer.adapters.methods.common import (
    BASE_BIASES,
    CAUSAL,
    PREFIX,
    WHOLE_MODULES,
    Common,
    Refusal,
    Seed,
    Targeting,
    add_head_copy,
    check_count,
    choose_sites,
    explain_for,
    per_site,
    random_positions,
    read_fields,
    wrong,
)
from veneer.adapters.program import Program, Site

_DB2 = tuple((a + b * math.sqrt(3)) / math.sqrt(32) for a, b in ((1, 1), (3, 1), (3, -1), (1, -1)))
# Reconstruction low-pass filters f; the high-pass g is f backwards with alternating signs.
# I. Daubechies, Ten Lectures on Wavelets (1992), table 6.1; the symlet of order 2 is db2.
FILTERS: Mapping[str, tuple[float, ...]] = {"db1": (math.sqrt(0.5),) * 2, "db2": _DB2, "sym2": _DB2}


class Honoured(Targeting, frozen=True, kw_only=True):
    """The fields that decide what the adapter computes, with peft's defaults."""

    peft_type: Literal["WAVEFT"]
    n_frequency: int = 2592
    n_frequency_pattern: dict[str, int] | None = None
    proportional_parameters: bool = False
    random_loc_seed: Seed = 777
    scaling: float = 25.0
    use_idwt: bool = True
    wavelet_family: str = "db1"


class TrainingOnly(Common, frozen=True, kw_only=True):
    """Fields without effect on inference; PEFT sets fan_in_fan_out to false for linear layers."""

    fan_in_fan_out: bool = False
    init_weights: bool = True


REFUSED: Mapping[str, Refusal] = {
    "bias": BASE_BIASES,
    "modules_to_save": WHOLE_MODULES,
    "task_type": CAUSAL,
}


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a PEFT WaveFT. See `veneer.adapters.methods.base.Method`."""
    config = read_fields(checkpoint.config, Honoured, TrainingOnly, REFUSED, "WaveFTConfig")
    if config.use_idwt and config.wavelet_family not in FILTERS:
        rule = f"with use_idwt only {', '.join(FILTERS)} are served; train with one of them"
        raise wrong("wavelet_family", config.wavelet_family, rule)
    warnings: list[str] = []
    sites = choose_sites(config, base, checkpoint.header, ".waveft_", warnings)
    shapes: dict[str, tuple[int, ...]] = {}
    for site, count in zip(sites, _counts(config, sites, warnings), strict=True):
        check_count("n_frequency", count, count, site)
        shapes[f"{PREFIX}{site.name}.waveft_spectrum"] = (count,)
    add_head_copy(shapes, checkpoint.header, sites, warnings)
    checkpoint.require(shapes, explain_for(".waveft_", base))
    return Program(
        kind="waveft",
        sites={
            site.name: sparse_change(site, *_entries(checkpoint, config, site), max_rank, base)
            for site in sites
        },
        base_model=config.base_model_name_or_path or "",
        warnings=tuple(warnings),
    )


def _counts(config: Honoured, sites: Sequence[Site], warnings: list[str]) -> list[int]:
    """The number of entries of each site. In proportion to its size, it ignores the pattern, as in peft."""
    if not config.proportional_parameters:
        return per_site(
            sites, "n_frequency_pattern", config.n_frequency_pattern, config.n_frequency, warnings
        )
    total = sum(site.in_features * site.out_features for site in sites)
    budget = config.n_frequency * len(sites)
    return [max(1, round(site.in_features * site.out_features / total * budget)) for site in sites]


def _entries(checkpoint: Checkpoint, config: Honoured, site: Site) -> tuple[torch.Tensor, torch.Tensor]:
    """Places [2, entries] and values [entries] of ΔW."""
    values = checkpoint.read(f"{PREFIX}{site.name}.waveft_spectrum").double()
    positions = random_positions(site, len(values), config.random_loc_seed)
    if not config.use_idwt:
        return positions, values * config.scaling
    delta = _inverse(values * config.scaling, positions, site, FILTERS[config.wavelet_family])
    places = delta.nonzero().T
    return places, delta[places[0], places[1]]


def _inverse(values: torch.Tensor, positions: torch.Tensor, site: Site, low: Sequence[float]) -> torch.Tensor:
    """The inverse transform [out, in] of `values` [n] that stand at `positions` [2, n] of the four bands."""
    sizes = torch.tensor([site.out_features, site.in_features])
    padded = sizes + len(low) - 2 + sizes % 2
    rows, columns = positions + ((padded - sizes) // 2)[:, None]
    bands = torch.zeros(*padded.tolist(), dtype=torch.double)
    bands[rows, columns] = values
    (approximation, horizontal), (vertical, diagonal) = (
        half.chunk(2, dim=1) for half in bands.chunk(2, dim=0)
    )
    # "horizontal" is high along the rows' axis and low along the columns'.
    low_rows = _synthesise(approximation.T, vertical.T, low).T
    high_rows = _synthesise(horizontal.T, diagonal.T, low).T
    delta = _centre(_synthesise(low_rows, high_rows, low), site.out_features)
    return _centre(delta.T, site.in_features).T


def _synthesise(low_band: torch.Tensor, high_band: torch.Tensor, low: Sequence[float]) -> torch.Tensor:
    """Two bands [n, columns] -> [2 n - length of the filter + 2, columns]."""
    count, length = len(low_band), len(low)
    out = torch.zeros(2 * count - 2 + length, low_band.shape[1], dtype=low_band.dtype)
    for at in range(length):
        out[at : at + 2 * count : 2] += low[at] * low_band + (-1) ** at * low[length - 1 - at] * high_band
    return out[(2 * length - 3) // 2 : len(out) - (2 * length - 3) // 2]


def _centre(matrix: torch.Tensor, rows: int) -> torch.Tensor:
    start = (len(matrix) - rows) // 2
    return matrix[start : start + rows]
