"""PEFT's IA3: y = l ⊙ (W0 x + b), or y = W0 (l ⊙ x) + b in feed-forward modules; read as peft 0.21 writes it.

https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/ia3/layer.py

Keys are `base_model.model.<module>.ia3_l`, [1, in] in feed-forward modules and [out, 1] in others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.common import (
    CAUSAL,
    NO_FIELD,
    PREFIX,
    WHOLE_MODULES,
    Common,
    Refusal,
    Targeting,
    add_head_copy,
    choose_sites,
    explain_for,
    read_fields,
    wrong,
)
from veneer.adapters.program import Program, Site, SiteProgram


class Honoured(Targeting, frozen=True, kw_only=True):
    """The fields that decide what the adapter computes, with peft's defaults."""

    peft_type: Literal["IA3"]
    feedforward_modules: list[str] | str | None = None


class TrainingOnly(Common, frozen=True, kw_only=True):
    """Fields without effect on inference; linear layers store their weights as [out, in] whatever is said."""

    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True


REFUSED: Mapping[str, Refusal] = {
    "layers_pattern": NO_FIELD,
    "layers_to_transform": NO_FIELD,
    "modules_to_save": WHOLE_MODULES,
    "task_type": CAUSAL,
}


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a PEFT IA3. See `veneer.adapters.methods.base.Method`."""
    config = read_fields(checkpoint.config, Honoured, TrainingOnly, REFUSED, "IA3Config")
    warnings: list[str] = []
    sites = choose_sites(config, base, checkpoint.header, ".ia3_", warnings)
    inputs = {site.name for site in sites if _is_feedforward(config, site, checkpoint)}
    shapes: dict[str, tuple[int, ...]] = {
        _key(site): (1, site.in_features) if site.name in inputs else (site.out_features, 1) for site in sites
    }
    add_head_copy(shapes, checkpoint.header, sites, warnings)
    checkpoint.require(shapes, explain_for(".ia3_", base))
    programs = {}
    for site in sites:
        scale = checkpoint.read(_key(site)).flatten()
        on_input = site.name in inputs
        programs[site.name] = (
            SiteProgram(rotate_in=scale.view(-1, 1, 1)) if on_input else SiteProgram(scale_out=scale)
        )
    return Program(
        kind="ia3",
        sites=programs,
        base_model=config.base_model_name_or_path or "",
        warnings=tuple(warnings),
        portability="proportional",
    )


def _key(site: Site) -> str:
    return f"{PREFIX}{site.name}.ia3_l"


def _is_feedforward(config: Honoured, site: Site, checkpoint: Checkpoint) -> bool:
    """As peft's _check_target_module_feedforward; a regular expression is not run, the file's shape tells."""
    modules = config.feedforward_modules
    if modules is None:
        raise wrong("feedforward_modules", None, "it must list the modules whose input is scaled, or be []")
    if isinstance(modules, str):
        info = checkpoint.header.get(_key(site))
        return info is not None and info.shape == (1, site.in_features)
    return any(site.name.endswith(module) for module in modules)
