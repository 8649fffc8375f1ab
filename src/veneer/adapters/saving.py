"""A program as the two files of an adapter: a LoRA in PEFT's format where that says all of it, else our PROGRAM.

Sites come one after the other and go to the disk at once, so that no more than one of them is in memory. The header
of a safetensors file stands before its data; so the data is collected in a file beside it first.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch

from veneer.adapters.methods.common import PREFIX
from veneer.adapters.methods.program import KIND, TAIL, A, B, tensors_of
from veneer.adapters.names import CONFIG_FILE, WEIGHTS_FILE
from veneer.adapters.program import EMBEDDING, Program, Site, SiteProgram
from veneer.adapters.staging import storage_errors

_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int32: "I32",
    torch.int64: "I64",
}
_DATA = "data"
_LORA = {A, B, "bias"}
_LORA_BIAS = "lora_B.bias"


class _Place(NamedTuple):
    """What there is at a site, for the config."""

    site: Site
    rank: int
    names: frozenset[str]


class TensorFile:
    """Writes a safetensors file tensor by tensor. Entered, filled, then `finish`ed; else nothing is left.

    https://huggingface.co/docs/safetensors/index#format
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._data = path.with_name(f"{path.name}.{_DATA}")
        self._entries: dict[str, dict[str, Any]] = {}
        self._end = 0

    def __enter__(self) -> Self:
        self._file = self._data.open("xb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._data.unlink(missing_ok=True)
        if error is not None:
            self._path.unlink(missing_ok=True)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        self._file.write(data)
        start, self._end = self._end, self._end + data.nbytes
        self._entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, self._end],
        }

    def finish(self, renamed: Mapping[str, str] | None = None) -> None:
        """Write the file; tensors in `renamed` get other names than they were added by."""
        names = renamed or {}
        entries = {names.get(name, name): entry for name, entry in self._entries.items()}
        header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
        header += b" " * (-len(header) % 8)
        self._file.flush()
        with self._path.open("xb") as target, self._data.open("rb") as source:
            target.write(len(header).to_bytes(8, "little") + header)
            shutil.copyfileobj(source, target, 1 << 20)
            target.flush()
            os.fsync(target.fileno())


class ProgramWriter:
    """Writes a program into a folder, site by site. Use as a context manager; `finish` makes it complete."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = TensorFile(folder / WEIGHTS_FILE)
        self._places: dict[str, _Place] = {}
        self._activations: dict[str, dict[str, Any]] = {}
        self._pairs: dict[str, int] = {}

    def __enter__(self) -> Self:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def add(self, site: Site, part: SiteProgram, *, in_tail: bool = False) -> None:
        """Raises StorageFull."""
        if not part.tensors:
            return
        place = f"{TAIL if in_tail else ''}{site.name}"
        tensors = tensors_of(part)
        with storage_errors("the merged adapter"):
            for name, tensor in tensors.items():
                self._file.add(f"{PREFIX}{place}.{name}", tensor)
        self._places[place] = _Place(site, part.rank, frozenset(tensors))
        if (found := part.activation) is not None:
            fields = ("kind", "group", "count", "top_k", "inner")
            self._activations[place] = {name: getattr(found, name) for name in fields}
        if part.pair:
            self._pairs[place] = part.pair

    def finish(self, common: Program) -> None:
        """Write what is left; `common` says all that is of no site. Raises StorageFull."""
        with storage_errors("the merged adapter"):
            if self._is_lora(common):
                config, renamed = self._as_lora(common)
            else:
                config, renamed = self._as_program(common), {}
            self._file.finish(renamed)
            (self._folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", "utf-8")

    def _is_lora(self, common: Program) -> bool:
        """Whether PEFT's LoRA says all of it."""
        biases = [place for place in self._places.values() if "bias" in place.names]
        return (
            bool(self._places)
            and common.span is None
            and not (self._activations or self._pairs)
            and not (biases and common.invocation)
            and all(
                {A, B} <= place.names <= _LORA and not place.site.is_hidden and place.site.name != EMBEDDING
                for place in self._places.values()
            )
        )

    def _as_lora(self, common: Program) -> tuple[dict[str, Any], dict[str, str]]:
        """The config, and the names that PEFT has for biases. B holds the scales, so that alpha is the rank."""
        has_bias = any("bias" in place.names for place in self._places.values())
        renamed = {}
        for name, place in self._places.items() if has_bias else ():
            if "bias" not in place.names:
                self._file.add(f"{PREFIX}{name}.bias", torch.zeros(place.site.out_features))
            renamed[f"{PREFIX}{name}.bias"] = f"{PREFIX}{name}.{_LORA_BIAS}"
        rank = Counter(place.rank for place in self._places.values()).most_common(1)[0][0]
        others = {name: place.rank for name, place in self._places.items() if place.rank != rank}
        config: dict[str, Any] = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": common.base_model or None,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": others,
            "alpha_pattern": others,
            "target_modules": sorted(self._places),
            "lora_bias": has_bias,
            "bias": "none",
        }
        if common.invocation:
            config["alora_invocation_tokens"] = list(common.invocation)
        return config, renamed

    def _as_program(self, common: Program) -> dict[str, Any]:
        return {
            "peft_type": KIND,
            "base_model_name_or_path": common.base_model or None,
            "portability": common.portability,
            "invocation": list(common.invocation),
            "span": None if common.span is None else common.span._asdict(),
            "activations": self._activations,
            "pairs": self._pairs,
        }


def save_program(program: Program, base_sites: Mapping[str, Site], folder: Path) -> None:
    """Write a whole program. Raises StorageFull."""
    with ProgramWriter(folder) as writer:
        for in_tail, sites in ((False, program.sites), (True, program.tail)):
            for name, part in sites.items():
                writer.add(base_sites[name], part, in_tail=in_tail)
        writer.finish(program)
