"""PEFT's models under training, and where LoRA's factors start.

`init`: where A and B begin. "pissa" (https://arxiv.org/abs/2404.02948) and "olora" (https://arxiv.org/abs/2406.01775)
take a part B0 A0 of the weight into the adapter; the base keeps its weight, so the view subtracts it meanwhile
(`FrozenLinear.offset`), and the file holds the difference B A - B0 A0 as an ordinary LoRA of twice the rank.
"loftq" (https://arxiv.org/abs/2310.08659) starts at what quantization left out of the weight. "eva"
(https://arxiv.org/abs/2410.07170) starts A at the directions in which the data moves each layer's input.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.adalora.model import AdaLoraModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from veneer.adapters.names import CONFIG_FILE, WEIGHTS_FILE
from veneer.engine.view import FrozenLinear
from veneer.training.trainable import Trainable

_ALLOCATION = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # what AdaLoRA's allocator remembers, by parameter


class PeftTrainable(Trainable):
    """An adapter of PEFT's."""

    def __init__(self, view: Any, config: Any, base_name: str) -> None:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            self.model: Any = peft.get_peft_model(view, config)
        for each in said:
            if str(each.message).startswith("Invalid"):  # PEFT would go on with another value
                raise ValueError(str(each.message))
        self.packs = not config.is_prompt_learning
        config.base_model_name_or_path = base_name  # a path of this machine means nothing elsewhere
        if isinstance(getattr(config, "target_modules", None), set):
            config.target_modules = sorted(config.target_modules)  # a set's order changes from run to run
        self._config = config
        self._whole: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # offsets by module path

    def disabled(self) -> AbstractContextManager[Any]:
        manager: AbstractContextManager[Any] = self.model.disable_adapter()
        return _without_offsets(self, manager) if self._whole else manager

    def stepped(self, step: int) -> None:
        if isinstance(self.model.base_model, AdaLoraModel):
            self.model.base_model.update_and_allocate(step)

    def state(self) -> dict[str, torch.Tensor]:
        if not isinstance(self.model.base_model, AdaLoraModel):
            return {}
        allocator = self.model.base_model.rankallocator
        kept = {part: getattr(allocator, part) for part in _ALLOCATION}
        pattern = self._config.rank_pattern or {}
        kept["rank_pattern"] = {name: torch.tensor(ranks) for name, ranks in pattern.items()}
        return {f"{part}/{name}": tensor for part, found in kept.items() for name, tensor in found.items()}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        if not isinstance(self.model.base_model, AdaLoraModel):
            return
        for part in _ALLOCATION:
            setattr(self.model.base_model.rankallocator, part, _part(state, part))
        pattern = {name: ranks.tolist() for name, ranks in _part(state, "rank_pattern").items()}
        self._config.rank_pattern = pattern or None

    def penalty(self) -> torch.Tensor | None:
        """AdaLoRA's: how far P and Q are from orthogonal. PEFT adds it to a loss that it computes itself."""
        if not isinstance(self.model.base_model, AdaLoraModel):
            return None
        factors = {
            name: each
            for name, each in self.model.named_parameters()
            if "lora_A." in name or "lora_B." in name
        }
        parts = []
        for name, each in factors.items():
            square = each @ each.T if "lora_A." in name else each.T @ each
            parts.append(torch.linalg.norm(square - torch.eye(len(square), device=square.device)))
        return self._config.orth_reg_weight * torch.stack(parts).mean()  # type: ignore[no-any-return]

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model.save_pretrained(folder, save_embedding_layers=False)
        tensors = load_file(folder / WEIGHTS_FILE)
        if self._whole:
            tensors = self._differences(tensors)
            self._double(folder / CONFIG_FILE)
        rounded = {
            name: (each.to(dtype) if each.is_floating_point() else each).contiguous()
            for name, each in tensors.items()
        }
        save_file(rounded, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card

    def take(self, layers: Iterator[tuple[str, FrozenLinear, torch.Tensor, torch.Tensor]]) -> None:
        """Let the base's layers stand without (A0, B0), which the factors have taken."""
        for name, layer, a, b in layers:
            layer.offset = a, b
            self._whole[name] = a, b

    def offsets(self) -> Iterator[FrozenLinear]:
        for name in self._whole:
            yield self.model.get_submodule(name).get_base_layer()

    def _differences(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """B A s - B0 A0 as one product: [A; A0] and [B, -B0 / s], whose scale is again s (`_double`)."""
        scale = _scaling(self._config)
        found = {}
        for name, (a, b) in self._whole.items():
            one, other = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
            found[one] = torch.cat([tensors[one], a.to(tensors[one])])
            found[other] = torch.cat([tensors[other], -b.to(tensors[other]) / scale], 1)
        return {**tensors, **found}

    def _double(self, path: Path) -> None:
        config = json.loads(path.read_text())
        factor = math.sqrt(2) if config["use_rslora"] else 2
        config |= {
            "r": 2 * config["r"],
            "lora_alpha": config["lora_alpha"] * factor,
            "init_lora_weights": True,
        }
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _part(state: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    return {name.partition("/")[2]: each for name, each in state.items() if name.startswith(f"{part}/")}


class _without_offsets:
    """PEFT's own manager, and the base whole again meanwhile."""

    def __init__(self, owner: PeftTrainable, inner: AbstractContextManager[Any]) -> None:
        self._inner = inner
        self._layers = [(layer, layer.offset) for layer in owner.offsets()]

    def __enter__(self) -> Any:
        for layer, _ in self._layers:
            layer.offset = None
        return self._inner.__enter__()

    def __exit__(self, *exception: Any) -> Any:
        for layer, offset in self._layers:
            layer.offset = offset
        return self._inner.__exit__(*exception)


def _scaling(config: Any) -> float:
    return float(config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r))


def start_factors(
    trainable: PeftTrainable,
    init: str,
    weights: Path,
    examples: Callable[[], list[dict[str, torch.Tensor]]],
) -> None:
    """Set LoRA's factors to where `init` says; see the module. Raises ValueError."""
    if init == "eva":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft.initialize_lora_eva_weights(trainable.model, examples(), show_progress_bar=False)
        return
    layers = _layers(trainable)
    if init == "loftq":
        with torch.no_grad():
            for name, layer, base in layers:
                left = _unquantized(weights, name).to(base.resident_weight()) - base.resident_weight()
                _set(layer, *_truncated(left.float(), layer.r["default"]))
        return
    split = _truncated if init == "pissa" else _orthogonal
    trainable.take(_taken(layers, split))


def _layers(trainable: PeftTrainable) -> list[tuple[str, Any, FrozenLinear]]:
    found = []
    for name, layer in trainable.model.named_modules():
        if isinstance(layer, LoraLayer):
            base = layer.get_base_layer()
            if not isinstance(base, FrozenLinear):
                raise ValueError(f"{name}: such a start needs a linear layer")
            found.append((name, layer, base))
    return found


@torch.no_grad()
def _taken(
    layers: Any, split: Callable[..., Any]
) -> Iterator[tuple[str, FrozenLinear, torch.Tensor, torch.Tensor]]:
    for name, layer, base in layers:
        a, b = split(base.resident_weight().float(), layer.r["default"])
        _set(layer, a, b)
        yield name, base, a, b


def _set(layer: Any, a: torch.Tensor, b: torch.Tensor) -> None:
    """Let the layer's update be B A."""
    layer.lora_A["default"].weight.data.copy_(a)
    layer.lora_B["default"].weight.data.copy_(b / layer.scaling["default"])


def _truncated(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of the best product of this rank, each with the roots of the singular values."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    roots = s[:rank].sqrt()
    return roots[:, None] * v[:rank], u[:, :rank] * roots


def _orthogonal(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    q, r = torch.linalg.qr(matrix)
    return r[:rank], q[:, :rank]


def _unquantized(folder: Path, layer: str) -> torch.Tensor:
    """The checkpoint's weight of a layer. Raises ValueError."""
    wanted = f"{layer.removeprefix('base_model.model.')}.weight"
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if wanted in file.keys():  # noqa: SIM118 - no mapping
                found: torch.Tensor = file.get_tensor(wanted)
                return found
    raise ValueError(f"init 'loftq' needs the unquantized {wanted!r}, which {folder.name!r} does not have")
