"""On a CUDA device: 32 mixed requests on layers of Llama-3.1-8B's shapes, NF4, against PEFT."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from veneer.engine.config import EngineConfig
from veneer.engine.engine import Engine
from veneer.engine.messages import Generate, Outputs, SamplingParams, SequenceOutput

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

RANKS = (1, 8, 16, 16, 32, 64, 128)
REQUESTS = 32
TOKENS = 16
PROJECTIONS = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 1024),
    "self_attn.v_proj": (4096, 1024),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (4096, 14336),
    "mlp.up_proj": (4096, 14336),
    "mlp.down_proj": (14336, 4096),
}
LAYERS = 8  # of 32: depth adds loading time to the test, not coverage


@pytest.fixture(scope="module")
def model_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of Llama-3.1-8B's shapes in bfloat16, on disk."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_theta=500000.0,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder = tmp_path_factory.mktemp("8b")
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    return folder


@pytest.fixture(scope="module")
def store_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random LoRA adapters on all seven projections, in PEFT's file format."""
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("store")
    for index, rank in enumerate(RANKS):
        generator = torch.Generator("cuda").manual_seed(index)
        tensors = {}
        for layer in range(LAYERS):
            for name, (inputs, outputs) in PROJECTIONS.items():
                prefix = f"base_model.model.model.layers.{layer}.{name}"
                a = torch.randn(rank, inputs, device="cuda", generator=generator) / inputs**0.5
                b = torch.randn(outputs, rank, device="cuda", generator=generator) * 0.05 / rank**0.5
                tensors[f"{prefix}.lora_A.weight"] = a.bfloat16().cpu()
                tensors[f"{prefix}.lora_B.weight"] = b.bfloat16().cpu()
        folder = root / "blobs" / digest_of(index)
        folder.mkdir(parents=True)
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": rank,
            "lora_alpha": rank,
            "target_modules": sorted(name.split(".")[1] for name in PROJECTIONS),
        }
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return root


def digest_of(index: int) -> str:
    return f"{index:064x}"


@pytest.fixture(scope="module", params=["bitsandbytes", "packed"])
def answers(
    request: pytest.FixtureRequest, model_8b: Path, store_8b: Path
) -> list[tuple[Generate, list[SequenceOutput]]]:
    """What the engine says to 32 requests in one mixed batch, with fewer slots than adapters."""
    engine = Engine(
        EngineConfig(
            model=str(model_8b),
            store=str(store_8b),
            device="cuda",
            nf4_kernels=request.param,
            max_loras=5,
            kv_cache_memory=4 << 30,
            max_num_batched_tokens=1024,
        )
    )
    assert engine.info().kernels == "triton"
    generator = random.Random(5)
    requests = []
    for index in range(REQUESTS):
        choice = index % (len(RANKS) + 1)
        requests.append(
            Generate(
                id=f"r{index}",
                prompt=[generator.randrange(128256) for _ in range(generator.choice([5, 64, 200, 700]))],
                sampling=SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True, logprobs=1),
                adapter=None if choice == len(RANKS) else digest_of(choice),
            )
        )
    found: dict[str, list[SequenceOutput]] = {request.id: [] for request in requests}
    for each in requests:
        assert engine.handle(each) == []
    while engine.has_work:
        for reply in engine.step()[0]:
            for item in reply.items if isinstance(reply, Outputs) else []:
                found[item.id].append(item)
    assert engine.residency.stats()[digest_of(0)].loads > 0
    engine.close()
    del engine
    torch.cuda.empty_cache()
    return [(request, found[request.id]) for request in requests]


def peft_logprobs(model_8b: Path, store_8b: Path, asked: list[Any], dtype: torch.dtype) -> list[torch.Tensor]:
    """Log probabilities of each request's own output tokens, teacher-forced, one request at a time."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from veneer.engine.base import quantization_config

    base: Any = AutoModelForCausalLM.from_pretrained(
        model_8b,
        dtype=dtype,
        quantization_config=quantization_config("nf4", dtype),
        device_map={"": "cuda:0"},
    )
    blobs = store_8b / "blobs"
    model: Any = PeftModel.from_pretrained(base, blobs / digest_of(0), "a0", autocast_adapter_dtype=False)
    for index in range(1, len(RANKS)):
        model.load_adapter(blobs / digest_of(index), f"a{index}", autocast_adapter_dtype=False)
    model.eval()
    results = []
    with torch.inference_mode():
        for request, tokens in asked:
            ids = torch.tensor([request.prompt + tokens], device="cuda")
            keep = len(tokens) + 1
            if request.adapter is None:
                with model.disable_adapter():
                    logits = model(ids, logits_to_keep=keep).logits[0, :-1]
            else:
                model.set_adapter(f"a{int(request.adapter, 16)}")
                logits = model(ids, logits_to_keep=keep).logits[0, :-1]
            logs = torch.log_softmax(logits.float(), -1)
            results.append(logs[torch.arange(len(tokens)), torch.tensor(tokens)].cpu())
    del model, base
    torch.cuda.empty_cache()
    return results


def test_8b_shapes_agree_with_peft(answers: Any, model_8b: Path, store_8b: Path) -> None:
    """The engine in bfloat16 is as near to float32 as PEFT in bfloat16 is."""
    asked = [(request, [token for item in items for token in item.tokens]) for request, items in answers]
    assert all(len(tokens) == TOKENS for _, tokens in asked)
    ours = [torch.tensor([item.logprobs[0].logprob for item in items]) for _, items in answers]
    exact = peft_logprobs(model_8b, store_8b, asked, torch.float32)
    peft = peft_logprobs(model_8b, store_8b, asked, torch.bfloat16)
    own = (torch.stack(ours) - torch.stack(exact)).abs()
    theirs = (torch.stack(peft) - torch.stack(exact)).abs()
    print(f"mean |error| of a log probability: veneer {own.mean():.4f}, PEFT {theirs.mean():.4f}")
    print(f"largest: veneer {own.max():.4f}, PEFT {theirs.max():.4f}")
    assert own.mean() < 1.3 * theirs.mean()
    assert own.max() < 2 * theirs.max()
    # the adapters act: the same prompt under other adapters would differ by far more than rounding
    by_request = own.mean(1)
    assert by_request.max() < 5 * by_request.mean()
