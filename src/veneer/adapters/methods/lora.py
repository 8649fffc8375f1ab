"""PEFT's LORA, read as peft 0.21 writes it: y += s·B(A x) + s·b, with s = α/r, or α/√r for rsLoRA.

Keys are `base_model.model.<module>.lora_A.weight` [r, in], `lora_B.weight` [out, r] and `lora_B.bias` [out].
DoRA adds `lora_magnitude_vector` [out].
BD-LoRA stores one of the two without the zeros around its diagonal of n blocks: A [r, in / n], B [out, r / n].
With `bias` the file also holds biases that replace the base's: `<module>.base_layer.bias` of targeted modules,
`<module>.bias` of others. VeLoRA and MonteCLoRA compute a plain LoRA at evaluation; their own keys go unread.
With arrow_config the adapter routes over others: see arrow.py.
aLoRA is a plain LoRA that acts on the tokens from its invocation on (https://arxiv.org/abs/2504.12397).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from veneer.adapters.checkpoint import Checkpoint, shown
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.common import (
    PREFIX,
    add_head_copy,
    choose_sites,
    per_site,
    wrong,
)
from veneer.adapters.methods.lora_config import VARIANTS, BlockDiagonal, Honoured, read_config
from veneer.adapters.methods.lora_embedding import (
    FIELD,
    embedding_shapes,
    read_embedding,
    read_tokens,
    shares_rows,
    token_shapes,
    trained_tokens,
)
from veneer.adapters.methods.token_rows import check_added, with_tokens
from veneer.adapters.program import EMBEDDING, HEAD, Program, Site, SiteProgram
from veneer.errors import AdapterRefused

_MAGNITUDE = "lora_magnitude_vector"
_UNREAD = (
    "lora_velora_embed",
    "lora_monteclora_sampler.expert_weights",
    "lora_monteclora_sampler.expert_weights_prior",
    "lora_monteclora_sampler.gaussian_var_prior",
    "lora_monteclora_sampler.std_prior",
)


class Scaled(NamedTuple):
    """A site the adapter changes."""

    site: Site
    rank: int
    scale: float
    a_blocks: int  # on the diagonal of A; 1: A is dense
    b_blocks: int


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a PEFT LoRA. See `veneer.adapters.methods.base.Method`."""
    config = read_config(checkpoint.config)
    if config.arrow_config is not None:
        from veneer.adapters.methods import arrow  # it lowers its experts by what is here

        return arrow.lower(checkpoint, base, max_rank)
    warnings: list[str] = []
    chosen = choose_sites(config, base, checkpoint.header, ".lora_", warnings, embedding=True)
    tokens = trained_tokens(config.trainable_token_indices, base)
    ties = _ties(config, chosen, tokens, base)
    if ties:
        chosen = [site for site in chosen if site.name != HEAD]  # it has what the embedding has
    sites = scaled_sites(config, chosen, max_rank, warnings)
    embedding = next((item for item in sites if item.site.name == EMBEDDING), None)
    shapes = shapes_of(config, [item for item in sites if item != embedding]) | token_shapes(tokens, base)
    if embedding is not None:
        shapes |= embedding_shapes(embedding.rank, base, ties, checkpoint.header)
    biases = _replaced_biases(config, sites, base)
    shapes |= {key: tuple(bias.shape) for key, bias in biases.values()}
    shapes |= _unread(config, sites, checkpoint)
    copied = [item.site for item in sites] + ([base.sites[HEAD]] if ties else [])
    add_head_copy(shapes, checkpoint.header, copied, warnings)
    if config.fan_in_fan_out:
        warnings.append(
            "fan_in_fan_out: true has no effect on a base of linear layers; PEFT sets it to false."
        )
    invocation = _invocation(config, base, warnings)
    checkpoint.require(shapes, lambda key: _explain(key, base))
    programs = {
        item.site.name: _read(checkpoint, item, config.lora_bias) for item in sites if item != embedding
    }
    if embedding is not None:
        programs |= read_embedding(checkpoint, embedding.scale, base, ties)
    if config.use_dora:
        for name, program in programs.items():
            magnitude = checkpoint.read(f"{PREFIX}{name}.{_MAGNITUDE}")
            programs[name] = _dora(program, name, magnitude, base)
    for name, (key, bias) in biases.items():
        programs[name] = _with_bias(programs.get(name, SiteProgram()), checkpoint.read(key) - bias)
    programs = with_tokens(programs, read_tokens(checkpoint, tokens, base))
    check_added(programs, base, warnings)
    return Program(
        kind="lora",
        sites=programs,
        base_model=config.base_model_name_or_path or "",
        warnings=tuple(warnings),
        portability="proportional" if config.use_dora else "independent",
        invocation=invocation,
    )


def _ties(config: Honoured, chosen: Iterable[Site], tokens: Mapping[str, Sequence[int]], base: Base) -> bool:
    """Whether the head gets what the embedding gets. Refuses what PEFT does not combine at the two."""
    names = {site.name for site in chosen}
    ties = config.ensure_weight_tying and base.tied and EMBEDDING in names
    for field in (*VARIANTS, "lora_bias") if EMBEDDING in names else ():
        if getattr(config, field) not in (None, False):
            raise wrong(field, True, "it is not served at the embedding; leave that out of target_modules")
    own = tokens.get(EMBEDDING)
    if config.ensure_weight_tying and base.tied and tokens.get(HEAD, own) != own:
        raise wrong("ensure_weight_tying", True, "tied embeddings must have the same trainable_token_indices")
    if tokens and config.alora_invocation_tokens is not None:
        raise wrong(FIELD, sorted(tokens), "with aLoRA it would act before the invocation, too")
    trained = {*tokens, *([HEAD] if shares_rows(tokens, base) else [])}
    if both := trained & {*names, *([HEAD] if ties else [])}:
        raise wrong(FIELD, sorted(both), "PEFT does not combine it with LoRA on the same layer")
    return ties


def _invocation(config: Honoured, base: Base, warnings: list[str]) -> tuple[int, ...]:
    """The tokens from which on an aLoRA acts; none for others."""
    tokens = config.alora_invocation_tokens or []
    vocabulary = base.embedding.in_features
    if unknown := [token for token in tokens if token >= vocabulary]:
        rule = f"{unknown[0]} is no token of the base; it has {vocabulary}"
        raise wrong("alora_invocation_tokens", tokens, rule)
    if tokens:
        warnings.append(
            f"alora_invocation_tokens: the adapter acts from the last {tokens} of a prompt on. A prompt without "
            "these tokens is answered as the base does."
        )
    return tuple(tokens)


def scaled_sites(config: Honoured, sites: list[Site], max_rank: int, warnings: list[str]) -> list[Scaled]:
    ranks = per_site(sites, "rank_pattern", config.rank_pattern, config.r, warnings)
    alphas = per_site(sites, "alpha_pattern", config.alpha_pattern, config.lora_alpha, warnings)
    scaled = []
    for site, rank, alpha in zip(sites, ranks, alphas, strict=True):
        if not 1 <= rank <= max_rank:
            rule = f"the rank of {site.name} must be from 1 to {max_rank} (--max-lora-rank)"
            raise wrong("r" if rank == config.r else "rank_pattern", rank, rule)
        scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        scaled.append(Scaled(site, rank, scale, *_blocks(config.use_bdlora, site, rank)))
    return scaled


def _blocks(config: BlockDiagonal | None, site: Site, rank: int) -> tuple[int, int]:
    """The numbers of blocks of A and B, as peft's BdLoraLinearVariant chooses them."""
    if config is None:
        return 1, 1
    count, field = config.nblocks, "use_bdlora"
    in_a = any(part in site.name for part in config.target_modules_bd_a or ())
    in_b = any(part in site.name for part in config.target_modules_bd_b or ())
    if in_a and in_b:
        raise wrong(field, site.name, "it is in both target_modules_bd_a and target_modules_bd_b")
    if not (in_a or in_b):
        if config.match_strict:
            raise wrong(field, site.name, "with match_strict it must be in one of the target_modules_bd")
        return 1, 1
    width = site.in_features if in_a else site.out_features
    if count < 1 or rank % count or width % count:
        raise wrong(field, count, f"nblocks must divide {site.name}'s rank {rank} and its {width} features")
    return (count, 1) if in_a else (1, count)


def shapes_of(config: Honoured, sites: Iterable[Scaled]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for site, rank, _, a_blocks, b_blocks in sites:
        shapes[f"{PREFIX}{site.name}.lora_A.weight"] = (rank, site.in_features // a_blocks)
        shapes[f"{PREFIX}{site.name}.lora_B.weight"] = (site.out_features, rank // b_blocks)
        if config.use_dora:
            shapes[f"{PREFIX}{site.name}.{_MAGNITUDE}"] = (site.out_features,)
        if config.lora_bias and b_blocks == 1:  # PEFT's block-diagonal B has no bias
            shapes[f"{PREFIX}{site.name}.lora_B.bias"] = (site.out_features,)
    return shapes


def _replaced_biases(
    config: Honoured, sites: Iterable[Scaled], base: Base
) -> dict[str, tuple[str, torch.Tensor]]:
    """The sites whose bias the file replaces, each with its key and the base's bias [out]."""
    if config.bias == "none":
        return {}
    targeted = {item.site.name for item in sites}
    found = ((name, base.bias(name)) for name in (base.sites if config.bias == "all" else targeted))
    return {
        name: (f"{PREFIX}{name}.{'base_layer.' * (name in targeted)}bias", bias)
        for name, bias in found
        if bias is not None
    }


def _unread(config: Honoured, sites: Iterable[Scaled], checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Tensors that only the training of VeLoRA and MonteCLoRA uses, with whatever shapes they have."""
    if config.velora_config is None and config.monteclora_config is None:
        return {}
    keys = [f"{PREFIX}{item.site.name}.{name}" for item in sites for name in _UNREAD]
    return {key: checkpoint.header[key].shape for key in keys if key in checkpoint.header}


def _read(checkpoint: Checkpoint, item: Scaled, lora_bias: bool) -> SiteProgram:
    key = f"{PREFIX}{item.site.name}"
    a = _dense(checkpoint.read(f"{key}.lora_A.weight"), item.a_blocks)
    b = _dense(checkpoint.read(f"{key}.lora_B.weight"), item.b_blocks).t().contiguous().mul_(item.scale)
    has_bias = lora_bias and item.b_blocks == 1
    bias = checkpoint.read(f"{key}.lora_B.bias").mul_(item.scale) if has_bias else None
    if not (b.isfinite().all() and (bias is None or bias.isfinite().all())):
        raise wrong("lora_alpha", item.scale, f"with this scale the values of {item.site.name} overflow")
    return SiteProgram(a=a, b=b, bias=bias)


def _dora(program: SiteProgram, name: str, magnitude: torch.Tensor, base: Base) -> SiteProgram:
    """y = m / ‖W0 + sBA‖ ⊙ (W0 + sBA) x + b, with the norm of each row (https://arxiv.org/abs/2402.09353)."""
    a, b = program.a, program.b
    assert a is not None
    assert b is not None
    norm = torch.linalg.vector_norm(base.weight(name).addmm_(b.T, a), dim=1)
    scale = magnitude / norm
    if not scale.isfinite().all():
        raise AdapterRefused(f"At {name} a row of the weight that DoRA normalizes is zero or overflows.")
    bias = base.bias(name)
    return SiteProgram(a=a, b=b * scale, bias=None if bias is None else bias - scale * bias, scale_out=scale)


def _dense(stored: torch.Tensor, blocks: int) -> torch.Tensor:
    """[rows, columns / blocks] -> [rows, columns] with the blocks on the diagonal."""
    if blocks == 1:
        return stored.contiguous()
    rows, width = stored.shape[0] // blocks, stored.shape[1]
    dense = torch.zeros(blocks, rows, blocks, width)
    each = torch.arange(blocks)
    dense[each, :, each] = stored.view(blocks, rows, width)
    return dense.view(blocks * rows, blocks * width)


def _with_bias(program: SiteProgram, change: torch.Tensor) -> SiteProgram:
    return replace(program, bias=change if program.bias is None else program.bias + change)


def _explain(key: str, base: Base) -> str:
    """Why a tensor that the config does not name is refused."""
    module, _, part = key.removeprefix(PREFIX).partition(".lora_")
    if not key.startswith(PREFIX):
        return f"PEFT's keys begin with {PREFIX!r}"
    if part.startswith("embedding"):
        return "target_modules leaves the embedding out"
    if part.startswith("magnitude"):
        return "use_dora is false, or leaves this layer out"
    if key.endswith(".bias") and not part:
        return "bias is 'none', or no linear layer of the base has this bias"
    if re.fullmatch(r"[AB]\.[^.]+\.(weight|bias)", part):
        return "the key holds an adapter's name; save with PEFT's save_pretrained, which removes it"
    if part not in ("A.weight", "B.weight", "B.bias"):
        return "it is no tensor of a plain LoRA, and an adapter cannot replace the base's own"
    if module not in base.sites:
        return f"the base has no linear layer {shown(module)}"
    if part == "B.bias":
        return "lora_bias is false"
    return "target_modules, exclude_modules and layers_to_transform leave this layer out"
