"""What conformance is checked on: one `Case` for each method and variant, made by the method's own library.

A file `cases_<group>.py` beside this one has a list `CASES`; `collect` finds them all. Nearly every case is one
call of `peft_case` with a function that gives PEFT's config; sizes come from the model it is made on:

    CASES = [peft_case("LORA", "", lambda model: LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))]

The base is `tiny_base` unless the command names another: a Llama with q, k, v, o, gate, up and down projections.
"""

from __future__ import annotations

import copy
import importlib
import pkgutil
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from veneer.adapters.names import CONFIG_FILE, WEIGHTS_FILE

# Token ids of the tiny base's vocabulary, 96. Cases that act on single tokens choose from the prompt's.
PROMPT = (1, 5, 9, 33, 2, 91, 40, 7, 5, 60, 12, 77, 3, 21, 9, 54, 88, 14, 1, 30, 66, 45, 7)
CONTINUATION = (11, 83, 5, 49, 27, 90, 2, 64)  # no token twice: run.py forces them one after the other


def adapter_name(method: str) -> str:
    """A name that is part of no key: PEFT filters the keys it saves by the adapter's name."""
    return f"ad_{zlib.crc32(method.encode()):08x}"


def randomize(model: Any) -> None:
    """Move each trainable parameter from where it starts, so that the adapter acts strongly and stays tame."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data += 0.1 * torch.randn_like(parameter)


def save_with_peft(model: Any, folder: Path) -> None:
    """Save a PEFT model's one adapter. PEFT puts one that is not called "default" in a folder of its own."""
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            shutil.move(next(Path(temporary).rglob(name)), folder / name)


def load_with_peft(model: Any, folder: Path) -> Any:
    return PeftModel.from_pretrained(model, folder, adapter_name=adapter_name(folder.name))


def run_with_peft(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """One pass; what virtual tokens in front of the text say is left out."""
    logits: torch.Tensor = model(input_ids=tokens).logits
    return logits[:, -tokens.shape[1] :]


def run_task(model: Any, tokens: torch.Tensor, *, task: int) -> torch.Tensor:
    """One pass for one task of an adapter that has several."""
    return run_with_peft(lambda input_ids: model(input_ids=input_ids, task_ids=torch.tensor([task])), tokens)


@dataclass(frozen=True)
class Case:
    """One method or variant.

    Attributes:
        method: its row in the table; no other case has it.
        kind: its `peft_type`, as in `veneer.adapters.registry`.
        make: (transformers model of the base) -> the library's model, before training. May change its argument.
        randomize: gives the library's model the parameters of a trained adapter.
        save, load: the library's own. `load` gets a fresh model of the base, which it may change.
        run: (library's model, ids [1, n]) -> logits [1, n, vocabulary] of these tokens.
        task: the task_id of the requests, which `run` has to run, too.
        run_prompt: instead of `run` for an adapter that acts by where the prompt ends; gets its length, too.
        refused: the adapter cannot be served exactly, so that refusing it is what holds.
    """

    method: str
    kind: str
    make: Callable[[Any], Any]
    randomize: Callable[[Any], None] = randomize
    save: Callable[[Any, Path], None] = save_with_peft
    load: Callable[[Any, Path], Any] = load_with_peft
    run: Callable[[Any, torch.Tensor], torch.Tensor] = run_with_peft
    task: int = 0
    run_prompt: Callable[[Any, torch.Tensor, int], torch.Tensor] | None = None
    refused: bool = False

    def write(self, base: Any, folder: Path) -> None:
        """Make the adapter on a copy of `base` and save it in `folder`, with the same values each time."""
        torch.manual_seed(zlib.crc32(self.method.encode()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = self.make(copy.deepcopy(base)).eval()
            self.randomize(model)
            self.save(model, folder)

    def reference(
        self, base: Any, folder: Path, tokens: Sequence[int], prompt: int | None = None
    ) -> torch.Tensor:
        """The library's log probabilities [n, vocabulary], in float32, of what follows each of n tokens.

        The first `prompt` of them (unless told, all) are the prompt.
        """
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")
            model = self.load(copy.deepcopy(base), folder).eval()
            ids = torch.tensor([tokens], device=base.device)
            if self.run_prompt is None:
                logits = self.run(model, ids)
            else:
                logits = self.run_prompt(model, ids, len(tokens) if prompt is None else prompt)
            return torch.log_softmax(logits[0].float(), -1).cpu()


def peft_case(kind: str, variant: str, config: Callable[[Any], PeftConfig], **fields: Any) -> Case:
    """A case that PEFT makes: its `peft_type`, what is special about it in a few words or "", its config.

    `config` gets the base's transformers model; `fields` are further ones of `Case`. With a `task` PEFT is told it.
    """
    method = f"{kind} {variant}".strip()
    if "task" in fields:
        fields["run"] = partial(run_task, task=fields["task"])

    def make(model: Any) -> Any:
        return get_peft_model(model, config(model), adapter_name=adapter_name(method))

    return Case(method, kind, make, **fields)


def collect() -> tuple[Case, ...]:
    """The cases of all `cases_*.py`, in the order of the files' names."""
    found: list[Case] = []
    folder = str(Path(__file__).parent)
    for module in sorted(each.name for each in pkgutil.iter_modules([folder]) if each.name[:6] == "cases_"):
        found += importlib.import_module(f"veneer.training.conformance.{module}").CASES
    methods = [case.method for case in found]
    if twice := sorted({method for method in methods if methods.count(method) > 1}):
        raise ValueError(f"two cases have one name: {', '.join(twice)}")
    return tuple(found)


def tiny_base(folder: Path) -> None:
    """Save a random Llama of two layers with grouped-query attention: hidden size 64, vocabulary 96."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=256,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        # By default the weights are so small that the logits are flat, and the norms exactly 1.
        parameter.data += 0.15 * torch.randn_like(parameter)
    model.save_pretrained(folder)


def add_noise(folder: Path, copy_to: Path, amount: float = 0.01) -> None:
    """Copy an adapter with each number of its file changed by `amount` of itself, times a normal number."""
    torch.manual_seed(1)
    copy_to.mkdir(parents=True)
    shutil.copy(folder / CONFIG_FILE, copy_to)
    tensors = load_file(folder / WEIGHTS_FILE)
    for tensor in tensors.values():
        if tensor.is_floating_point():
            tensor *= 1 + amount * torch.randn_like(tensor)
    save_file(tensors, copy_to / WEIGHTS_FILE)
