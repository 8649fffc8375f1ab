"""The unquantized weights of a model's folder, read one matrix at a time: what a conversion rebuilds from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from veneer.adapters.program import HEAD, Site
from veneer.errors import InvalidRequest

_FLOATS = ("F32", "F16", "BF16")


class Weights:
    """The weights of a model's folder, read one tensor at a time.

    Attributes:
        sites: every matrix by the path of its module.

    Raises:
        InvalidRequest: the folder is not readable, or the model is quantized.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            settings = json.loads((folder / "config.json").read_text("utf-8"))
        except (ValueError, OSError) as error:
            raise InvalidRequest(f"{str(folder / 'config.json')!r} is not readable JSON: {error}") from error
        if "quantization_config" in settings:
            raise InvalidRequest(
                f"The weights in {str(folder)!r} are quantized (config.json: quantization_config); give the "
                "unquantized ones that the adapter was trained on."
            )
        self._is_tied = bool(settings.get("tie_word_embeddings"))
        index = folder / "model.safetensors.index.json"
        names = ["model.safetensors"]
        if index.is_file():
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        self._files = [self._open(folder / name) for name in names]
        self._places = {key: file for file in self._files for key in file.keys()}  # noqa: SIM118 (no mapping)

    def _open(self, path: Path) -> Any:
        try:
            return safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise InvalidRequest(f"{str(path)!r} is not a readable safetensors file: {error}") from error

    @cached_property
    def sites(self) -> Mapping[str, Site]:
        shapes = {key: file.get_slice(key).get_shape() for key, file in self._places.items()}
        return {
            (name := key.removesuffix(".weight")): Site(name, shape[1], shape[0])
            for key, shape in shapes.items()
            if key.endswith(".weight") and len(shape) == 2
        }

    @property
    def shares_head(self) -> bool:
        """Whether the output head is the embedding, so that what is taken out of one is missing in the other."""
        return self._is_tied or HEAD not in self.sites

    def tensor(self, key: str) -> torch.Tensor | None:
        """A tensor as it is stored, or None where there is none of this name."""
        file = self._places.get(key)
        return None if file is None else file.get_tensor(key)

    def dtype(self, site: str) -> str:
        """The dtype in the file. Raises InvalidRequest if the weight is quantized."""
        key = f"{site}.weight"
        dtype: str = self._places[key].get_slice(key).get_dtype()
        if dtype not in _FLOATS:
            raise InvalidRequest(
                f"{key} in {str(self._folder)!r} has dtype {dtype}; it must be one of {', '.join(_FLOATS)}. Give "
                "the unquantized weights that the adapter was trained on."
            )
        return dtype

    def read(self, site: str) -> torch.Tensor:
        """A weight [out, in] in float32, in memory of its own."""
        key = f"{site}.weight"
        weight: torch.Tensor = self._places[key].get_tensor(key).to(torch.float32, copy=True)
        if not weight.isfinite().all():
            raise InvalidRequest(f"{key} in {str(self._folder)!r} holds NaN or infinite values.")
        return weight
