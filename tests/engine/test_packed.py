"""Packed and fused NF4 linears against bitsandbytes' own, in a whole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from veneer.engine.base import forbid_repacking, fuse_norms, quantization_config, resolve_nf4_kernels
from veneer.engine.packed import (
    DequantizingLinear,
    FusedPart,
    Make,
    PackedLinear,
    dequantizing,
    pack_linears,
    packed,
)
from veneer.errors import InvalidRequest
from veneer.kernels.backend import Backend


def load(folder: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantization_config("nf4", torch.float32)
    )
    forbid_repacking(model)
    return model.eval()


@pytest.mark.parametrize("make", [packed, dequantizing])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3"])
def test_packed_model_gives_the_logits_of_bitsandbytes(
    architecture: str, make: Make, tiny_model: Callable[[str], Path]
) -> None:
    model = load(tiny_model(architecture))
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        expected = model(ids).logits
        replaced = pack_linears(model, make)
        for name, module in replaced.items():
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, module)
        found = model(ids).logits
    # the values of NF4 are rounded to bf16 in the packed form, by up to 2^-9 each
    tolerance = 0.02 if make is packed else 1e-5
    assert (found - expected).abs().max() < tolerance * expected.abs().max()
    wholes = sum(isinstance(module, PackedLinear | DequantizingLinear) for module in model.modules())
    assert wholes == 3 * 4  # layers; qkv, o, gate_up, down
    assert not any(type(module).__name__ == "Linear4bit" for module in model.modules())


def test_biases_are_fused_and_parts_know_their_sizes(tiny_model: Callable[[str], Path]) -> None:
    model = load(tiny_model("qwen2"))
    prefix = "model.layers.0.self_attn"
    before = {part: getattr(model.model.layers[0].self_attn, part) for part in ("q_proj", "k_proj", "v_proj")}
    x = torch.randn(5, 64)
    with torch.inference_mode():
        for module in before.values():
            nn.init.normal_(module.bias)
        expected = {part: module(x) for part, module in before.items()}
        replaced = pack_linears(model, packed)
        for part, y in expected.items():
            module = replaced[f"{prefix}.{part}"]
            assert isinstance(module, FusedPart)
            assert module.out_features == y.shape[-1]
            assert torch.allclose(module(x), y, atol=0.02 * float(y.abs().max()))


def test_parts_and_bias_add_up_to_the_output(tiny_model: Callable[[str], Path]) -> None:
    replaced = pack_linears(load(tiny_model("qwen2")), packed)
    whole: Any = replaced["model.layers.0.self_attn.q_proj"].whole
    whole.bias.normal_()
    x = torch.randn(5, 64)
    parts = whole.parts(x)
    assert parts.shape == (1, 5, 128)
    torch.testing.assert_close(parts.sum(0) + whole.bias, whole(x))


def test_a_group_knows_its_parts(tiny_model: Callable[[str], Path]) -> None:
    replaced = pack_linears(load(tiny_model("llama")), packed)
    names = ("0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj", "1.self_attn.v_proj")
    q, k, v, other_v = (replaced[f"model.layers.{name}"] for name in names)
    assert isinstance(q, FusedPart)
    assert q.group.is_made_of([q, k, v])
    for others in ([q, k], [q, v, k], [q, k, other_v], [q, k, v, v], [q, k, nn.Identity()]):
        assert not q.group.is_made_of(others)


def test_another_input_in_between_is_computed_anew(tiny_model: Callable[[str], Path]) -> None:
    replaced = pack_linears(load(tiny_model("llama")), packed)
    gate, up = (replaced[f"model.layers.1.mlp.{part}"] for part in ("gate_proj", "up_proj"))
    first, second = torch.randn(3, 64), torch.randn(2, 64)
    with torch.inference_mode():
        gate(first)
        expected = up(second)
        gate(second)
        assert torch.equal(up(second), expected)


def test_own_kernels_are_refused_where_they_cannot_run(
    tiny_model: Callable[[str], Path], make_engine: Callable[..., Any]
) -> None:
    with pytest.raises(InvalidRequest, match=r"--nf4-kernels packed cannot run nf4 in torch.float32 on cpu"):
        make_engine(tiny_model("llama"), quantization="nf4", nf4_kernels="packed")


@pytest.mark.parametrize(
    ("name", "quantization", "dtype", "triton", "own"),
    [
        ("auto", "nf4", torch.bfloat16, True, True),
        ("auto", "nf4", torch.bfloat16, False, False),
        ("auto", "nf4", torch.float16, True, False),
        ("auto", "int8", torch.bfloat16, True, False),
        ("auto", "none", torch.bfloat16, True, False),
        ("bitsandbytes", "nf4", torch.bfloat16, True, False),
        ("packed", "nf4", torch.bfloat16, True, True),
        ("packed", "nf4", torch.bfloat16, False, True),  # load_base refuses it
    ],
)
def test_own_kernels_are_chosen_where_they_can_run(
    name: str, quantization: str, dtype: torch.dtype, triton: bool, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = Backend("triton" if triton else "torch", "")
    monkeypatch.setattr("veneer.engine.base.resolve", lambda device: backend)
    assert resolve_nf4_kernels(name, quantization, dtype, torch.device("cuda:0")) == own


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3"])
def test_fused_norms_change_nothing(architecture: str, tiny_model: Callable[[str], Path]) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model(architecture), dtype=torch.float32).eval()
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        expected = model(ids).logits
        fuse_norms(model)
        assert (model(ids).logits - expected).abs().max() < 1e-5 * expected.abs().max()
    fused = sum(isinstance(module, nn.RMSNorm) for module in model.modules())
    assert (fused > 0) == (architecture != "gemma3")
