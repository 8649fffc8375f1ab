"""The case of PROGRAM, our own format of merges: primitives by hand, and weights changed by their formulas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from veneer.adapters.names import CONFIG_FILE, WEIGHTS_FILE
from veneer.training.conformance.cases import Case

LAYER = "model.layers.1."
PREFIX = "base_model.model."
PRODUCT, ENTRIES, WHOLE = (
    f"{LAYER}{each}" for each in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
)
SCALED, PAIRED, TURNED = (
    f"{LAYER}{each}" for each in ("self_attn.o_proj", "self_attn.k_proj", "mlp.up_proj")
)
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
TOKENS = [7, 9, 54]  # in the prompt, in order
RANK, PAIR, BLOCK, EACH = 4, 8, 4, 3  # EACH: entries of a row


def _make(model: Any) -> Any:
    """The numbers of the file as parameters, from where they do nothing."""

    def size(name: str) -> tuple[int, int]:
        rows, columns = model.get_submodule(name).weight.shape
        return int(rows), int(columns)

    rows, columns = size(PRODUCT)
    found = {
        f"{PRODUCT}.lora_A.weight": torch.randn(RANK, columns),
        f"{PRODUCT}.lora_B.weight": torch.zeros(rows, RANK),
        f"{ENTRIES}.sparse.values": torch.zeros(EACH * size(ENTRIES)[0]),
        f"{WHOLE}.dense": torch.zeros(size(WHOLE)),
        f"{SCALED}.scale_out": torch.ones(size(SCALED)[0]),
        f"{PAIRED}.scale_out": torch.ones(size(PAIRED)[0]),
        f"{PAIRED}.cross_out": torch.zeros(size(PAIRED)[0]),
        f"{TURNED}.rotate_in": torch.eye(BLOCK).repeat(size(TURNED)[1] // BLOCK, 1, 1),
        f"{EMBEDDING}.tokens.rows": model.get_submodule(EMBEDDING).weight.data[TOKENS].clone(),
        f"{HEAD}.tokens.rows": model.get_submodule(HEAD).weight.data[TOKENS].clone(),
    }
    for parameter in model.parameters():
        parameter.requires_grad = False
    numbers = {name.replace(".", "/"): nn.Parameter(each) for name, each in found.items()}
    model.numbers = nn.ParameterDict(numbers)
    return model


def _save(model: Any, folder: Path) -> None:
    folder.mkdir(parents=True)
    tensors = {name.replace("/", "."): each.data for name, each in model.numbers.items()}
    rows, columns = model.get_submodule(ENTRIES).weight.shape
    tensors[f"{ENTRIES}.sparse.starts"] = torch.arange(0, EACH * rows + 1, EACH, dtype=torch.int32)
    tensors[f"{ENTRIES}.sparse.columns"] = (torch.arange(EACH * rows, dtype=torch.int32) * 7 % columns).int()
    for site in (EMBEDDING, HEAD):
        tensors[f"{site}.tokens.ids"] = torch.tensor(TOKENS, dtype=torch.int32)
    save_file({f"{PREFIX}{name}": each for name, each in tensors.items()}, folder / WEIGHTS_FILE)
    config = {"peft_type": "PROGRAM", "portability": "proportional", "pairs": {PAIRED: PAIR}}
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def _load(model: Any, folder: Path) -> Any:
    """The base with changed weights."""
    found = {name.removeprefix(PREFIX): each for name, each in load_file(folder / WEIGHTS_FILE).items()}

    def weight(name: str) -> torch.Tensor:
        own: torch.Tensor = model.get_submodule(name).weight.data
        return own

    weight(PRODUCT).add_(found[f"{PRODUCT}.lora_B.weight"] @ found[f"{PRODUCT}.lora_A.weight"])
    starts, columns = found[f"{ENTRIES}.sparse.starts"], found[f"{ENTRIES}.sparse.columns"]
    for row in range(len(starts) - 1):
        for at in range(int(starts[row]), int(starts[row + 1])):
            weight(ENTRIES)[row, columns[at]] += found[f"{ENTRIES}.sparse.values"][at]
    weight(WHOLE).add_(found[f"{WHOLE}.dense"])
    weight(SCALED).mul_(found[f"{SCALED}.scale_out"][:, None])
    own = weight(PAIRED).clone()
    partners = own.view(-1, 2, PAIR // 2, own.shape[1]).flip(1).reshape(own.shape)
    weight(PAIRED).mul_(found[f"{PAIRED}.scale_out"][:, None])
    weight(PAIRED).add_(found[f"{PAIRED}.cross_out"][:, None] * partners)
    turn = torch.block_diag(*found[f"{TURNED}.rotate_in"])  # type: ignore[no-untyped-call]  # x' = x R
    weight(TURNED).copy_(weight(TURNED) @ turn.T)
    for site in (EMBEDDING, HEAD):
        weight(site)[found[f"{site}.tokens.ids"].long()] = found[f"{site}.tokens.rows"]
    return model


CASES = [Case("PROGRAM", "PROGRAM", _make, save=_save, load=_load)]
