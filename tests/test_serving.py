"""The whole product on the packaged base: 32 concurrent requests over many adapters, against PEFT."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import AsyncOpenAI
from tests.conftest import ROOT, LiveServer

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]

RANKS = (1, 2, 4, 8, 16, 24, 32, 64)
DEMOS = sorted(p.parent.name for p in (ROOT / "examples").glob("*/adapter_config.json"))
REQUESTS = 32
TOKENS = 12
TOLERANCE = 1e-4  # of the largest logit, float32 on both sides


@dataclass(frozen=True)
class Server:
    url: str
    model: str
    folder: Path
    adapters: dict[str, Path]


@pytest.fixture(scope="module")
def base_folder() -> Path:
    from veneer.engine.source import resolve

    return resolve(None)


@pytest.fixture(scope="module")
def random_adapters(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """LoRA adapters of ranks 1 to 64 on different targets, saved by PEFT."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    targets: list[Any] = [
        "all-linear",
        ["q_proj", "v_proj"],
        ["gate_proj", "up_proj", "down_proj", "lm_head"],
    ]
    made = {}
    for index, rank in enumerate(RANKS):
        torch.manual_seed(index)
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=targets[index % 3],
            use_rslora=index % 2 == 1,
            task_type="CAUSAL_LM",
        )
        adapted = get_peft_model(base, config)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.01)
        made[f"random-{rank}"] = tmp_path_factory.mktemp(f"random-{rank}")
        adapted.save_pretrained(made[f"random-{rank}"], save_embedding_layers=False)
        base = adapted.unload()
    return made


@pytest.fixture(scope="module", params=["none", "nf4"])
def server(
    request: pytest.FixtureRequest,
    live_server: Callable[..., LiveServer],
    base_folder: Path,
    random_adapters: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Server, str]]:
    """Four device slots, the demo adapters as modules, the random ones uploaded."""
    options = ["--store", str(tmp_path_factory.mktemp("store")), "--max-loras", "4"]
    options += ["--quantization", request.param, "--dtype", "float32", "--kv-cache-memory", "512MiB"]
    options += ["--lora-modules", *(f"{name}={ROOT / 'examples' / name}" for name in DEMOS)]
    live = live_server(*options)
    for name, folder in random_adapters.items():
        files = [
            ("files", (path, (folder / path).read_bytes()))
            for path in ("adapter_config.json", "adapter_model.safetensors")
        ]
        reply = live.http.post("/v1/adapters", data={"name": name}, files=files)
        assert reply.status_code == 201, reply.text
    model = live.http.get("/v1/models").json()["data"][0]["id"]
    adapters = {**{name: ROOT / "examples" / name for name in DEMOS}, **random_adapters}
    yield Server(live.url, model, base_folder, adapters), request.param
    assert live.stop() == 0


@dataclass(frozen=True)
class Answer:
    model: str
    prompt: list[int]
    tokens: list[str]
    logprobs: list[float]
    text: str


async def ask(client: AsyncOpenAI, model: str, prompt: list[int]) -> Answer:
    reply = await client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=TOKENS,
        temperature=0,
        logprobs=1,
        extra_body={"ignore_eos": True},
    )
    choice = reply.choices[0]
    logprobs = choice.logprobs
    assert logprobs is not None
    values = [value for value in logprobs.token_logprobs or [] if value is not None]
    return Answer(model, prompt, logprobs.tokens or [], values, choice.text)


def workload(server: Server) -> list[tuple[str, list[int]]]:
    generator = random.Random(11)
    models = [server.model, *server.adapters]
    return [
        (
            models[i % len(models)],
            [generator.randrange(3, 49000) for _ in range(generator.choice([3, 9, 30, 80]))],
        )
        for i in range(REQUESTS)
    ]


def test_mixed_batch_equals_alone_and_peft(server: tuple[Server, str]) -> None:
    running, quantization = server
    work = workload(running)

    async def collect() -> tuple[list[Answer], list[Answer]]:
        async with AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none") as client:
            together = await asyncio.gather(*(ask(client, model, prompt) for model, prompt in work))
            alone = [await ask(client, model, prompt) for model, prompt in work]
        return list(together), alone

    together, alone = asyncio.run(collect())
    for one, other in zip(together, alone, strict=True):
        assert one.tokens == other.tokens
        assert one.text == other.text
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)  # TOLERANCE of logits around 10
    assert len({tuple(answer.tokens) for answer in together}) > len(running.adapters)
    worst = max_difference_from_peft(running, together, quantization)
    assert worst < TOLERANCE
    stats = {item["id"]: item for item in httpx.get(f"{running.url}/v1/adapters").json()["data"]}
    assert sum(item["evictions"] for item in stats.values()) > 0  # four slots were too few


def max_difference_from_peft(server: Server, answers: list[Answer], quantization: str) -> float:
    """The largest difference of a chosen token's log probability from PEFT's, teacher-forced.

    Relative to the request's largest logit.
    """
    from peft import PeftModel
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    from veneer.engine.base import forbid_repacking, quantization_config

    tokenizer = Tokenizer.from_file(str(server.folder / "tokenizer.json"))
    base: Any = AutoModelForCausalLM.from_pretrained(
        server.folder,
        dtype=torch.float32,
        quantization_config=quantization_config(quantization, torch.float32),
    )
    forbid_repacking(base)  # where the processor has AVX512-BF16 it would compute in bfloat16
    names = list(server.adapters)
    model: Any = PeftModel.from_pretrained(base, server.adapters[names[0]], adapter_name="ad_0")
    for index, name in enumerate(names[1:], 1):
        model.load_adapter(server.adapters[name], adapter_name=f"ad_{index}")
    model.eval()
    worst = 0.0
    with torch.inference_mode():
        for answer in answers:
            output = token_ids(tokenizer, answer.tokens)
            ids = torch.tensor([answer.prompt + output])
            if answer.model == server.model:
                with model.disable_adapter():
                    logits = model(ids).logits[0]
            else:
                model.set_adapter(f"ad_{names.index(answer.model)}")
                logits = model(ids).logits[0]
            logs = torch.log_softmax(logits[len(answer.prompt) - 1 : -1], -1)
            expected = logs[torch.arange(len(output)), torch.tensor(output)]
            difference = (expected - torch.tensor(answer.logprobs)).abs().max() / logits.abs().max()
            worst = max(worst, difference.item())
    return worst


def token_ids(tokenizer: Any, tokens: list[str]) -> list[int]:
    """Ids of the API's token strings: decoded text, or `bytes:\\x..` where it is no valid UTF-8."""
    by_text: dict[str, int] = {}
    for index in range(tokenizer.get_vocab_size()):
        by_text.setdefault(tokenizer.decode([index], skip_special_tokens=False), index)
    return [by_text[token] for token in tokens]
