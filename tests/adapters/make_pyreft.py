"""Makes tests/adapters/pyreft: interventions saved by pyreft, and what it computes with them on a prompt.

Run it in the environment of make_adapterhub.py, with pyvene==0.1.8 and pyreft==0.1.0 besides:

    python tests/adapters/make_pyreft.py tests/adapters/adapterhub/base tests/adapters/pyreft

Its pickles are kept as safetensors of the same names: the repository holds no pickle, the tests make them again.
"""

from __future__ import annotations

import importlib
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

# By name: this project is checked without them.
pyreft: Any = importlib.import_module("pyreft")
dataset: Any = importlib.import_module("pyreft.dataset")

PROMPT = (1, 5, 9, 33, 2, 91, 40, 7, 5, 60, 12, 77, 3, 21, 9, 54, 88, 14, 1, 30, 66, 45, 7)
# name -> (class, layers, first, last)
CASES: Mapping[str, tuple[str, list[int], int, int]] = {
    "loreft": ("LoreftIntervention", [0, 1], 3, 0),
    "loreft-both": ("LoreftIntervention", [0, 1, 0, 1], 3, 3),
    "loreft-shared": ("LoreftIntervention", [1], 2, 3),
    "noreft": ("NoreftIntervention", [0, 1], 0, 5),
    "consreft": ("ConsreftIntervention", [0], 4, 0),
    "lobireft": ("LobireftIntervention", [0], 2, 2),
    "direft": ("DireftIntervention", [0, 1, 0, 1], 2, 2),
    "nodireft": ("NodireftIntervention", [0, 1], 3, 3),
}


def make(model: Any, name: str, folder: Path) -> torch.Tensor:
    kind, layers, first, last = CASES[name]
    torch.manual_seed(zlib.crc32(name.encode()))
    made = getattr(pyreft, kind, None) or getattr(importlib.import_module("pyreft.interventions"), kind)
    representations = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": 3,
            "intervention": made(
                embed_dim=model.config.hidden_size, low_rank_dimension=3, dtype=torch.float32, add_bias=True
            ),
        }
        for layer in layers
    ]
    reft = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=representations), set_device=False)
    for parameter in reft.interventions.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    reft.eval()
    at = dataset.get_intervention_locations(
        last_position=len(PROMPT),
        first_n=first,
        last_n=last,
        num_interventions=len(layers),
        share_weights=len(set(layers)) == len(layers),
    )
    # Where both ends have their own, they are as long: the shorter one would be padded with the last token.
    locations = torch.tensor(at).unsqueeze(1).tolist()
    tokens = torch.tensor([PROMPT])
    with torch.no_grad():
        _, out = reft({"input_ids": tokens}, unit_locations={"sources->base": (None, locations)})
    reft.save(str(folder))
    for pickled in folder.glob("*.bin"):
        tensors = torch.load(pickled, weights_only=True)
        save_file(
            {key: value.contiguous() for key, value in tensors.items()}, pickled.with_suffix(".safetensors")
        )
        pickled.unlink()
    return torch.log_softmax(out.logits[0].float(), -1)


if __name__ == "__main__":
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    target.mkdir(exist_ok=True)
    recorded = {}
    for each in CASES:
        plain = AutoModelForCausalLM.from_pretrained(source).eval()
        recorded[each] = make(plain, each, target / each)
    save_file(recorded, target / "expected.safetensors")
