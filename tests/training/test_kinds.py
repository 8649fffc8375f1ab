"""Every kind of adapter that can be trained: it learns, and what was trained is what is served."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from veneer.engine.base import Base, load_base
from veneer.engine.view import FrozenLinear, trainable_view
from veneer.errors import InvalidRequest
from veneer.training.data.batching import batches
from veneer.training.data.collation import collate
from veneer.training.data.encoding import Encoded
from veneer.training.evaluation.answers import Answers
from veneer.training.kinds import KINDS, Setting, make_trainable
from veneer.training.losses import token_losses
from veneer.training.recipe import Adapter, Training
from veneer.training.trainable import Trainable, parameters
from veneer.training.trainer import Trainer

ROWS = [Encoded([5, 6, 7, 8 + i, 40, 41], [60 + i, 61, 2]) for i in range(8)]
CASES: dict[str, dict[str, Any]] = {
    **{kind: {"kind": kind} for kind in KINDS},
    "pissa": {"init": "pissa", "rank": 4},
    "rslora pissa": {"kind": "rslora", "init": "pissa", "rank": 4},
    "olora": {"init": "olora", "rank": 4},
    "eva": {"init": "eva", "rank": 4},
    "bottlenecks": {"kind": "bottleneck", "options": {"places": ["attention", "mlp"], "source": "sum"}},
    "prefix projected": {"kind": "prefix", "options": {"prefix_projection": True, "encoder_hidden_size": 32}},
}


class Quiet:
    """A control that keeps the reports and never waits."""

    def __init__(self) -> None:
        self.reports: list[tuple[str, dict[str, Any]]] = []

    def report(self, kind: str, message: str = "", **data: Any) -> None:
        self.reports.append((kind, data))

    def turn(self) -> None:
        pass


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bases(tiny_base: Path) -> dict[str, Base]:
    device = torch.device("cpu")
    return {
        name: load_base(tiny_base, quantization=name, dtype=torch.float32, device=device)
        for name in ("none", "nf4")
    }


@pytest.fixture(params=["none", "nf4"])
def base(request: pytest.FixtureRequest, bases: dict[str, Base]) -> Base:
    return bases[request.param]


@pytest.fixture
def plain_base(bases: dict[str, Base]) -> Base:
    return bases["none"]


@pytest.fixture(scope="module")
def engines(bases: dict[str, Base], tiny_base: Path) -> Iterator[dict[str, Answers]]:
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(Answers(base, tiny_base, longest=64, batch_size=4))
            for name, base in bases.items()
        }


def make(base: Base, folder: Path, steps: int = 12, **adapter: Any) -> tuple[Training, Trainable]:
    training = Training(adapter=Adapter(**adapter), steps=steps, learning_rate=0.02, batch_size=4, seed=3)
    examples = [{name: each for name, each in collate(ROWS, 2).inputs().items() if name != "labels"}]
    setting = Setting(trainable_view(base), steps, "tiny-base", folder, lambda: examples)
    return training, make_trainable(training, setting)


def weights_of(base: Base) -> str:
    tensors = [*base.model.parameters(), *base.model.buffers()]
    return hashlib.sha256(b"".join(each.detach().numpy().tobytes() for each in tensors)).hexdigest()


@torch.no_grad()
def next_tokens(trainable: Trainable, prompt: list[int], count: int) -> list[int]:
    """Greedy continuation by the model under training."""
    trainable.model.eval()
    tokens = list(prompt)
    for _ in range(count):
        trainable.begin([len(prompt)])
        ids = torch.tensor([tokens])
        logits = trainable.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    ("name", "quantization"),
    [
        *((name, "none") for name in CASES),
        *((name, "nf4") for name in ("lora", "dora", "oft", "reft", "layers")),
    ],
)
def test_it_learns_and_is_served_as_it_was_trained(
    name: str,
    quantization: str,
    bases: dict[str, Base],
    engines: dict[str, Answers],
    tiny_base: Path,
    tmp_path: Path,
) -> None:
    base, answers = bases[quantization], engines[quantization]
    before = weights_of(base)
    training, trainable = make(base, tiny_base, **CASES[name])
    control = Quiet()
    result = Trainer(training, trainable, ROWS, [], 2, tmp_path, control).run()
    losses = [step.loss for step in result.steps]
    assert len(losses) == 12
    assert sum(losses[-3:]) < 0.98 * sum(losses[:3])
    assert weights_of(base) == before
    prompts = [[5, 6, 7, 9, 40, 41], [11, 12, 13]]
    served = answers.generate(prompts, answers.add(result.folder), 8)
    plain = answers.generate(prompts, None, 8)
    trained = [next_tokens(trainable, prompt, 8) for prompt in prompts]
    assert served == [tokens[: tokens.index(2)] if 2 in tokens else tokens for tokens in trained]
    with trainable.disabled():
        untrained = [next_tokens(trainable, prompt, 8) for prompt in prompts]
    assert plain == [tokens[: tokens.index(2)] if 2 in tokens else tokens for tokens in untrained]


def test_the_view_has_every_weight_of_the_base_and_no_copy(base: Base) -> None:
    owned = {each.untyped_storage().data_ptr() for each in [*base.model.parameters(), *base.model.buffers()]}
    view = trainable_view(base)
    tensors = [*view.parameters(), *view.buffers()]
    assert tensors
    assert {each.untyped_storage().data_ptr() for each in tensors} <= owned
    linears = [module for module in view.modules() if isinstance(module, FrozenLinear)]
    assert len(linears) == len(base.sites)
    assert not any(parameter.requires_grad for parameter in view.parameters())


def test_gradients_are_those_of_the_dequantized_model(base: Base, tiny_base: Path) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    for name, module in plain.named_modules():
        if name in base.sites:
            module.weight.data = base.weight(name)
    view = trainable_view(base)
    batch = collate(ROWS, 2)
    found = []
    for model in (plain, view):
        model.requires_grad_(False)
        embeddings = model.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
        logits = model(inputs_embeds=embeddings, attention_mask=batch.attention_mask).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.input_ids.flatten()).backward()  # type: ignore[no-untyped-call]
        found.append(embeddings.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-7)


def test_an_initialisation_that_takes_a_part_of_the_weight_begins_at_the_base(
    plain_base: Base, tiny_base: Path
) -> None:
    batch = collate(ROWS, 2)
    expected = token_losses(trainable_view(plain_base), batch)
    for init in ("pissa", "olora", "eva"):
        _, trainable = make(plain_base, tiny_base, init=init, rank=4)
        torch.testing.assert_close(token_losses(trainable.model, batch), expected, rtol=1e-4, atol=1e-5)
        assert all(each.requires_grad for each in parameters(trainable).values())


def test_loftq_begins_nearer_to_the_unquantized_weights(tiny_base: Path) -> None:
    base = load_base(tiny_base, quantization="nf4", dtype=torch.float32, device=torch.device("cpu"))
    exact = load_base(tiny_base, quantization="none", dtype=torch.float32, device=torch.device("cpu"))
    batch = collate(ROWS, 2)
    view = trainable_view(exact)
    expected = view(input_ids=batch.input_ids).logits
    _, quantized = make(base, tiny_base, rank=16)
    _, started = make(base, tiny_base, rank=16, init="loftq")
    errors = [(m.model(input_ids=batch.input_ids).logits - expected).norm() for m in (quantized, started)]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"options": {"r": 5}}, "adapter.options .*'r' follows from the adapter's own fields"),
        ({"options": {"colour": 1}}, "'colour' is no field of PEFT's LoraConfig"),
        ({"kind": "dora", "init": "pissa"}, "for LoRA without DoRA"),
        ({"kind": "ia3", "targets": "all-linear"}, "IA3 scales keys"),
        ({"kind": "layers", "layers": [2]}, "layers .*the base has the layers 0 to 1"),
        ({"kind": "reft", "options": {"first": 0, "last": 0}}, "not both 0"),
        ({"kind": "bottleneck", "options": {"activation": "cube"}}, "activation 'cube' must be one of relu"),
        ({"targets": ["nothing"]}, r"adapter.targets \['nothing'\]"),
        ({"kind": "oft", "rank": 7}, "adapter.targets"),
    ],
)
def test_what_a_kind_cannot_use_is_refused_by_name(
    adapter: dict[str, Any], message: str, plain_base: Base, tiny_base: Path
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        make(plain_base, tiny_base, **adapter)


def test_every_kind_of_the_recipe_is_there() -> None:
    from typing import get_args

    from veneer.training.recipe import Kind

    assert set(get_args(Kind)) == set(KINDS)
    assert next(batches(3, 2, 0)).rows  # the data's order is known from the seed
