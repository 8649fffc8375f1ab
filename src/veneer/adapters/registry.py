"""The table of methods: which file lowers which `peft_type`, or which of AdapterHub's configs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from veneer.adapters.checkpoint import Checkpoint, shown
from veneer.adapters.methods import (
    adalora,
    adapterhub,
    adapterhub_bottleneck,
    adapterhub_fusion,
    adapterhub_lora,
    adapterhub_prefix_tuning,
    adapterhub_reft,
    adaption_prompt,
    beft,
    boft,
    bottleneck,
    c3a,
    cartridge,
    cpt,
    deft,
    delora,
    fourierft,
    glora,
    gralora,
    hira,
    hra,
    ia3,
    ln_tuning,
    loha,
    lokr,
    lora,
    miss,
    multitask_prompt_tuning,
    oft,
    p_tuning,
    partial,
    peanut,
    poly,
    prefix_tuning,
    program,
    prompt_tuning,
    pvera,
    randlora,
    road,
    shira,
    supertuning,
    tinylora,
    trainable_tokens,
    unilora,
    vblora,
    vera,
    waveft,
    whole_modules,
)
from veneer.adapters.methods.base import Base, Method
from veneer.adapters.names import CONFIG_FILE
from veneer.adapters.program import Program
from veneer.errors import AdapterRefused

METHODS: Mapping[str, Method] = {
    "ADALORA": adalora.lower,
    "ADAPTION_PROMPT": adaption_prompt.lower,
    "ADAPTERHUB_BOTTLENECK": adapterhub_bottleneck.lower,
    "ADAPTERHUB_FUSION": adapterhub_fusion.lower,
    "ADAPTERHUB_LORA": adapterhub_lora.lower,
    "ADAPTERHUB_PREFIX_TUNING": adapterhub_prefix_tuning.lower,
    "ADAPTERHUB_REFT": adapterhub_reft.lower,
    "BEFT": beft.lower,
    "BOFT": boft.lower,
    "BOTTLENECK": bottleneck.lower,
    "C3A": c3a.lower,
    "CARTRIDGE": cartridge.lower,
    "CPT": cpt.lower,
    "DEFT": deft.lower,
    "DELORA": delora.lower,
    "FOURIERFT": fourierft.lower,
    "GLORA": glora.lower,
    "GRALORA": gralora.lower,
    "HIRA": hira.lower,
    "HRA": hra.lower,
    "IA3": ia3.lower,
    "LN_TUNING": ln_tuning.lower,
    "LOHA": loha.lower,
    "LOKR": lokr.lower,
    "LORA": lora.lower,
    "MISS": miss.lower,
    "MULTITASK_PROMPT_TUNING": multitask_prompt_tuning.lower,
    "OFT": oft.lower,
    "PARTIAL": partial.lower,
    "PEANUT": peanut.lower,
    "POLY": poly.lower,
    "PREFIX_TUNING": prefix_tuning.lower,
    "PROGRAM": program.lower,
    "PROMPT_TUNING": prompt_tuning.lower,
    "PVERA": pvera.lower,
    "P_TUNING": p_tuning.lower,
    "RANDLORA": randlora.lower,
    "ROAD": road.lower,
    "SHIRA": shira.lower,
    "SUPERTUNING": supertuning.lower,
    "TINYLORA": tinylora.lower,
    "TRAINABLE_TOKENS": trainable_tokens.lower,
    "UNILORA": unilora.lower,
    "VBLORA": vblora.lower,
    "VERA": vera.lower,
    "WAVEFT": waveft.lower,
}

# Those whose config has no `modules_to_save`; methods/whole_modules.py reads it for all others.
KEEPING = frozenset(
    {
        "BOTTLENECK",
        "PROGRAM",
        "TRAINABLE_TOKENS",
        *(kind for kind in METHODS if kind.startswith("ADAPTERHUB_")),
    }
)

# What cannot be served exactly, and why. A kind in neither table is not known.
REFUSED: Mapping[str, str] = {
    "ADAMSS": "it is base-fragile: which rows it changes follows from the weights of its training and is not saved",
    "FROD": "it is base-fragile: its rotations follow from the weights it was trained on and are not saved",
    "LILY": "its router averages over all tokens and rows, so an answer would depend on the rest of the batch",
    "OSF": "it is base-fragile: it replaces the small singular directions of the weights it was trained on",
    "PSOFT": "it is base-fragile: its basis follows from the weights it was trained on and is not saved",
    "SHADOW": "it is a second model, with layers and a KV cache of its own, beside the base",
    "XLORA": "its weights come from another pass of the base, over adapters in other repositories; PEFT 0.21 does "
    "not save its classifier whole",
}


def lower(folder: Path | str, base: Base, max_rank: int, task: int = 0) -> Program:
    """Check the adapter in `folder` against the base and lower it to primitives: of a file with several tasks, one.

    Raises:
        AdapterRefused: the adapter cannot be served exactly as its files say.
    """
    checkpoint = Checkpoint(Path(folder), task)
    kind = adapterhub.kind_of(checkpoint.config) or checkpoint.config.get("peft_type")
    method = METHODS.get(kind) if isinstance(kind, str) else None
    if isinstance(kind, str) and kind in REFUSED:
        raise AdapterRefused(f"{CONFIG_FILE}: peft_type {shown(kind)} is refused: {REFUSED[kind]}.")
    if method is None:
        raise AdapterRefused(
            f"{CONFIG_FILE}: peft_type {shown(kind)} is not served; served are: {', '.join(METHODS)}."
        )
    whole = whole_modules.take(checkpoint, base) if kind not in KEEPING else None
    if whole is None:
        return method(checkpoint, base, max_rank)
    return whole.apply(method(whole.checkpoint, whole.base, max_rank), checkpoint, base)
