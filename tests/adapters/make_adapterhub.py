"""Makes tests/adapters/adapterhub: adapters saved by AdapterHub's own library, and what it computes with them.

Run it in an environment of its own, because the library needs an older transformers than this project:

    pip install torch==2.13.0 adapters==1.3.0
    PYTHONPATH=src python -c "from pathlib import Path; from veneer.training.conformance.cases import tiny_base; \
tiny_base(Path('tests/adapters/adapterhub/base'))"          # here, in the project's environment
    python tests/adapters/make_adapterhub.py tests/adapters/adapterhub

Each folder beside `base` is an adapter (of fused ones: a folder with those of its parts). `expected.safetensors`
has the library's log probabilities [tokens, vocabulary] of what follows each token of PROMPT, by folder.
"""

from __future__ import annotations

import importlib
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

# By name: in this repository `adapters` is a folder.
adapters: Any = importlib.import_module("adapters")


PROMPT = (1, 5, 9, 33, 2, 91, 40, 7, 5, 60, 12, 77, 3, 21, 9, 54, 88, 14, 1, 30, 66, 45, 7)

SINGLE: Mapping[str, Callable[[], Any]] = {
    "houlsby": lambda: adapters.DoubleSeqBnConfig(reduction_factor=8),
    "houlsby-leaky": lambda: adapters.DoubleSeqBnConfig(
        reduction_factor=16, non_linearity="leakyrelu", scaling=0.5
    ),
    "houlsby-linear": lambda: adapters.DoubleSeqBnConfig(reduction_factor=16, non_linearity="linear"),
    "pfeiffer": lambda: adapters.SeqBnConfig(reduction_factor=8),
    "pfeiffer-layers": lambda: adapters.SeqBnConfig(
        reduction_factor={"1": 4, "default": 16}, leave_out=[0], non_linearity="gelu_new"
    ),
    "pfeiffer-plus": lambda: adapters.AdapterPlusConfig(reduction_factor=8, stochastic_depth=0.0),
    "parallel": lambda: adapters.ParBnConfig(reduction_factor=8),
    "parallel-learned": lambda: adapters.ParBnConfig(reduction_factor=8, scaling="learned", mh_adapter=True),
    "compacter": lambda: adapters.CompacterConfig(reduction_factor=8),
    "compacter-own": lambda: adapters.CompacterPlusPlusConfig(
        reduction_factor=8, shared_phm_rule=False, factorized_phm_rule=True, phm_rank=2, non_linearity="tanh"
    ),
    "compacter-whole": lambda: adapters.CompacterConfig(
        reduction_factor=16, factorized_phm_W=False, shared_phm_rule=False, phm_bias=False, phm_dim=2
    ),
    "compacter-shared": lambda: adapters.CompacterConfig(
        reduction_factor=8, shared_W_phm=True, factorized_phm_rule=True, phm_dim=2
    ),
    "lora": lambda: adapters.LoRAConfig(r=4, alpha=8),
    "lora-all": lambda: adapters.LoRAConfig(
        r=2, alpha=6, attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True, leave_out=[1]
    ),
    "dora": lambda: adapters.DoRAConfig(r=4, alpha=8, output_lora=True),
    "vera": lambda: adapters.VeraConfig(r=4, attn_matrices=["q"]),
    "ia3": lambda: adapters.IA3Config(alpha=2),
    "prefix": lambda: adapters.PrefixTuningConfig(prefix_length=6, bottleneck_size=16),
    "prefix-flat": lambda: adapters.PrefixTuningConfig(prefix_length=5, flat=True),
    "loreft": lambda: adapters.LoReftConfig(r=3),
    "loreft-both": lambda: adapters.LoReftConfig(r=2, prefix_positions=4, suffix_positions=3, layers=[1]),
    "noreft": lambda: adapters.NoReftConfig(
        r=3, prefix_positions=2, suffix_positions=2, tied_weights=True, non_linearity="relu"
    ),
    "direft": lambda: adapters.DiReftConfig(r=2, prefix_positions=1, suffix_positions=5),
    "noreft-long": lambda: adapters.NoReftConfig(r=2, prefix_positions=15, suffix_positions=15),
}
FUSED: Mapping[str, tuple[str, dict[str, Any]]] = {
    "fusion": (
        "dynamic",
        {"one": adapters.SeqBnConfig(reduction_factor=8), "two": adapters.SeqBnConfig(reduction_factor=16)},
    ),
    "fusion-static": (
        "static",
        {
            "first": adapters.DoubleSeqBnConfig(reduction_factor=8, scaling="learned"),
            "second": adapters.DoubleSeqBnConfig(reduction_factor=16, leave_out=[1]),
            "third": adapters.DoubleSeqBnConfig(reduction_factor=32),
        },
    ),
}


def base(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder / "base", attn_implementation="eager")
    adapters.init(model)
    return model


def randomize(model: Any, seed: str) -> None:
    """Every tensor of the adapters moves from where it starts; the head, which trains with them, does not."""
    torch.manual_seed(zlib.crc32(seed.encode()))
    for key, parameter in model.named_parameters():
        trained = parameter.requires_grad or "shared_parameters" in key
        if trained and not key.startswith("lm_head"):
            parameter.data += 0.15 * torch.randn_like(parameter)


def logprobs(model: Any) -> torch.Tensor:
    model.eval()
    tokens = torch.tensor([PROMPT])
    with torch.no_grad():
        logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0]
    return torch.log_softmax(logits.float(), -1)


def save(model: Any, folder: Path) -> None:
    """As the library does. A prefix, which it cannot save as safetensors, without the names that share memory."""
    if model.adapters_config.get("task").architecture != "prefix_tuning":
        model.save_adapter(str(folder), "task", with_head=False, use_safetensors=True)
        return
    model.save_adapter(str(folder), "task", with_head=False)
    pickled = folder / "pytorch_adapter.bin"
    tensors = torch.load(pickled, weights_only=True)
    save_file({k: v for k, v in tensors.items() if "layers." not in k}, folder / "adapter.safetensors")
    pickled.unlink()


def make(folder: Path) -> dict[str, torch.Tensor]:
    found = {"base": logprobs(base(folder))}
    for name, config in SINGLE.items():
        model = base(folder)
        model.add_adapter("task", config=config())
        model.train_adapter("task")
        randomize(model, name)
        save(model, folder / name)
        found[name] = logprobs(model)
    for name, (kind, parts) in FUSED.items():
        model = base(folder)
        for part, each in parts.items():
            model.add_adapter(part, config=each)
        fused = adapters.Fuse(*parts)
        model.add_adapter_fusion(fused, kind)
        for part in parts:
            model.train_adapter(part)
            randomize(model, f"{name} {part}")
        model.train_adapter_fusion(fused)
        randomize(model, name)
        (folder / name).mkdir(exist_ok=True)
        for part in parts:
            model.save_adapter(str(folder / name / part), part, with_head=False, use_safetensors=True)
        model.save_adapter_fusion(str(folder / name / "layer"), fused, use_safetensors=True)
        model.set_active_adapters(fused)
        found[name] = logprobs(model)
    return found


if __name__ == "__main__":
    target = Path(sys.argv[1])
    recorded = make(target)
    save_file(recorded, target / "expected.safetensors")
    for name, each in recorded.items():
        print(f"{name}: moves the base by {(each - recorded['base']).abs().max():.2g}")
