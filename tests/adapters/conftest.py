"""Tiny bases and real PEFT adapters on them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.adapters.files import Files
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from veneer.adapters.methods.base import Limits, Norm
from veneer.adapters.program import EMBEDDING, Site
from veneer.adapters.store import AdapterStore


@dataclass(frozen=True)
class SiteTable:
    """What a method may ask about a base."""

    sites: Mapping[str, Site]
    model: Any
    limits: Limits = Limits()  # noqa: RUF009  (a tuple)
    dtype: torch.dtype = torch.float32
    embedding_scale: float = 1.0
    norms: Mapping[str, Norm] = field(default_factory=dict)

    def bias(self, site: str) -> None:
        return None

    @property
    def embedding(self) -> Site:
        return Site(EMBEDDING, self.model.config.vocab_size, self.hidden_size)

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.hidden_size)

    @property
    def tied(self) -> bool:
        return bool(self.model.config.tie_word_embeddings)

    def token_rows(self, site: str, ids: torch.Tensor) -> torch.Tensor:
        weight: torch.Tensor = self.model.get_submodule(site).weight
        return weight.detach()[ids]


def tiny_llama(*, tied: bool = False, hidden: int = 64) -> Any:
    """A random Llama of two layers with grouped-query attention, in float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def sites_of(model: nn.Module) -> SiteTable:
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    sites = {name: Site(name, linear.in_features, linear.out_features) for name, linear in linears}
    return SiteTable(sites, model)


@dataclass(frozen=True)
class Adapter(Files):
    """An adapter that PEFT saved, and the logits that PEFT computes with it for `TOKENS`."""

    logits: torch.Tensor


TOKENS = torch.tensor([[1, 5, 9, 33, 2, 95, 40, 7]])


def save_adapter(folder: Path, *, tied: bool = False, **fields: Any) -> Adapter:
    """Let PEFT make a LoRA on `tiny_llama`, fill it with random values, save it, load it and run it."""
    fields = {"r": 8, "lora_alpha": 24, "target_modules": ["q_proj", "v_proj"]} | fields
    model = get_peft_model(tiny_llama(tied=tied), LoraConfig(**fields))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(tiny_llama(tied=tied), folder).eval()
    with torch.no_grad():
        return Adapter(folder, loaded(TOKENS).logits)


@pytest.fixture(scope="session")
def plain_adapter(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    return save_adapter(tmp_path_factory.mktemp("plain") / "adapter")


@pytest.fixture
def adapter(plain_adapter: Adapter, tmp_path: Path) -> Adapter:
    """A copy of a plain LoRA of rank 8 on q_proj and v_proj."""
    shutil.copytree(plain_adapter.folder, tmp_path / "adapter")
    return Adapter(tmp_path / "adapter", plain_adapter.logits)


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Adapter]:
    """`save_adapter` into the test's folder."""
    return lambda **fields: save_adapter(tmp_path / "adapter", **fields)


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., Any]:
    return tiny_llama


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    return TOKENS


@pytest.fixture(scope="session")
def site_table() -> Callable[[nn.Module], SiteTable]:
    return sites_of


@pytest.fixture(scope="session")
def base() -> SiteTable:
    return sites_of(tiny_llama())


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    with AdapterStore(tmp_path / "store") as opened:
        yield opened
