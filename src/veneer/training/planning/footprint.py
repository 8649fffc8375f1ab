"""What a training will take, without training: its peak memory, exactly counted, and the work of its steps.

    footprint = predict(training, config, Machine("cuda", "nf4"), Load(rows=8, length=512))
    footprint.total, footprint.parameters

The trainable model is made by the same code as in a training (kinds.py), on fake tensors, which have shapes and no
numbers, and takes two steps with the trainer's losses and optimizer. A ledger sees every operation of them and
keeps the bytes that are alive. No weights are read. What is not counted: what a kernel takes within itself, the
padding of blocks by CUDA's caching allocator, and CUDA's context (some 0.5 GiB a process).
"""

from __future__ import annotations

import copy
import math
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoModelForCausalLM, masking_utils

from veneer.engine.view import FrozenLinear
from veneer.engine.weight_sizes import quantized_linears, weight_bytes
from veneer.training.data.collation import Batch
from veneer.training.kinds import Setting, make_trainable, plus_ratio
from veneer.training.losses import noisy_embeddings, pair_losses, token_losses
from veneer.training.optimizers import make_optimizer
from veneer.training.recipe import Training
from veneer.training.trainable import Trainable, parameters

CUBLAS_WORKSPACE = 32 << 20  # bytes; CUBLAS_WORKSPACE_CONFIG=:4096:8, which `veneer train` sets
_DEPTHS = (2, 3)  # layers of the models that stand for a deep one
_STEPS = 1000  # of a made-up training; no size depends on it
_SMALLEST_8BIT, _BLOCK_8BIT, _SMALLEST_PAGED = 4096, 256, 100_000  # bitsandbytes' optimizers


class Machine(NamedTuple):
    """Where a training runs: float32 on "cpu", bfloat16 on "cuda"."""

    device: str
    quantization: str  # of the base

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32


class Load(NamedTuple):
    """A micro-batch: rows, packed sequences or pairs of it, their tokens, and whether some are shorter."""

    rows: int
    length: int
    padded: bool = True


class Work(NamedTuple):
    """Operations of matrix products and attention, and bytes that everything else reads and writes."""

    products: float = 0
    moved: float = 0

    def __add__(self, other: Work) -> Work:  # type: ignore[override]
        return Work(self.products + other.products, self.moved + other.moved)

    def __sub__(self, other: Work) -> Work:
        return Work(self.products - other.products, self.moved - other.moved)

    def times(self, count: float) -> Work:
        return Work(self.products * count, self.moved * count)


@dataclass(frozen=True)
class Footprint:
    """All in bytes, but `parameters` (how many numbers are trained)."""

    weights: int  # of the resident base
    parameters: int
    state: int  # trained parameters, optimizer moments and what else stays between steps
    step: int  # gradients, what autograd keeps, and the working set, at the peak
    micro_batch: Work
    optimizer: Work

    @property
    def total(self) -> int:
        return self.weights + self.state + self.step


def predict(training: Training, config: Any, machine: Machine, load: Load) -> Footprint:
    """The footprint of steps with micro-batches of such a load, whatever `batch_size` and `max_length` say.

    A deep model is followed at two small depths. With layers that are alike the bytes at each of `_Peaks` grow by
    the same amount for every layer, so two depths give all.

    Raises:
        InvalidRequest: the adapter's fields do not fit the base.
    """
    training = _measurable(training)
    depth = int(config.num_hidden_layers)
    if depth <= max(_DEPTHS) or not _is_even(training, depth):
        return _footprint(_follow(training, config, machine, load), config, machine)
    low, high = (
        _follow(_at_depth(training, layers), _cut(config, layers), machine, load) for layers in _DEPTHS
    )
    reach = (depth - _DEPTHS[0]) / (_DEPTHS[1] - _DEPTHS[0])
    return _footprint(low.towards(high, reach), config, machine)


@dataclass(frozen=True)
class _Peaks:
    """Bytes besides the weights. In backward they fall or rise evenly from the last layer to the first."""

    last_layer: float  # the most until the last layer's backward is done
    first_layer: float  # in the first layer's backward
    optimizer: float
    state: float
    parameters: float
    micro_batch: Work
    optimizer_work: Work

    def towards(self, other: _Peaks, reach: float) -> _Peaks:
        def line(name: str) -> Any:
            start, end = getattr(self, name), getattr(other, name)
            return (
                start + (end - start).times(reach)
                if isinstance(start, Work)
                else start + reach * (end - start)
            )

        return _Peaks(**{each.name: line(each.name) for each in fields(self)})


def _follow(training: Training, config: Any, machine: Machine, load: Load) -> _Peaks:
    ledger = Ledger()
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, _replaceable_parameters(), _masks(training.packing), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        view = _view(config, machine, ledger)
        if training.gradient_checkpointing:
            kwargs = {"use_reentrant": False, "preserve_rng_state": False}  # fake tensors draw nothing
            view.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        with ledger:
            steps = _Steps(training, view, machine, load, ledger)
            steps.take()
            return steps.take()


def _footprint(peaks: _Peaks, config: Any, machine: Machine) -> Footprint:
    workspace = CUBLAS_WORKSPACE if machine.device == "cuda" else 0
    peak = max(peaks.last_layer, peaks.first_layer, peaks.optimizer)
    return Footprint(
        weights=weight_bytes(config, machine.quantization, machine.dtype, machine.device),
        parameters=round(peaks.parameters),
        state=round(peaks.state),
        step=round(peak - peaks.state) + workspace,
        micro_batch=peaks.micro_batch,
        optimizer=peaks.optimizer_work,
    )


def _is_even(training: Training, depth: int) -> bool:
    """Whether every layer has the same adapter."""
    adapter = training.adapter
    if adapter.layers is None:
        return adapter.kind != "layers" and not adapter.options
    return sorted(set(adapter.layers)) == list(range(depth)) and not adapter.options


def _at_depth(training: Training, layers: int) -> Training:
    if training.adapter.layers is None:
        return training
    adapter = training.adapter.model_copy(update={"layers": list(range(layers))})
    return training.model_copy(update={"adapter": adapter})


def _cut(config: Any, layers: int) -> Any:
    """The config of a model with fewer layers, but each kind of attention."""
    config = copy.deepcopy(config)
    types = getattr(config, "layer_types", None)
    if types is not None:
        config.layer_types = [*dict.fromkeys(types), *types][:layers]
    config.num_hidden_layers = layers
    return config


def _measurable(training: Training) -> Training:
    """The same training with a start that does not look at numbers; the sizes are the same."""
    if training.adapter.init not in ("eva", "loftq"):
        return training
    return training.model_copy(update={"adapter": training.adapter.model_copy(update={"init": "default"})})


class _Steps:
    """The trainer's steps without its numbers (trainer.py)."""

    def __init__(self, training: Training, view: Any, machine: Machine, load: Load, ledger: Ledger) -> None:
        setting = Setting(view, _STEPS, "base", Path(), list)
        self._training, self._machine, self._load, self._ledger = training, machine, load, ledger
        self._trainable: Trainable = make_trainable(training, setting)
        self.weights: Mapping[str, nn.Parameter] = parameters(self._trainable)
        self._optimizer = _optimizer(training, self.weights, machine)
        self._last = 0
        self._mark(view.model.layers)

    def take(self) -> _Peaks:
        """One step."""
        ledger, trainable, size = self._ledger, self._trainable, self._load.rows
        state, first, self._last = ledger.alive, 0, 0
        ledger.settle()
        with noisy_embeddings(trainable.model, self._training.neftune_alpha):
            for _ in range(min(2, self._training.accumulation)):  # the second one has gradients beside it
                start = ledger.work
                loss = self._loss() / size
                penalty = trainable.penalty()
                (loss if penalty is None else loss + penalty).backward()  # type: ignore[no-untyped-call]
                del loss, penalty
                first = max(first, ledger.settle())
        done = ledger.work
        torch.nn.utils.clip_grad_norm_(self.weights.values(), self._training.max_grad_norm)
        self._optimizer.step()
        optimizer = ledger.settle()
        self._optimizer.zero_grad(set_to_none=True)
        count = sum(each.numel() for each in self.weights.values())
        return _Peaks(self._last, first, optimizer, state, count, done - start, ledger.work - done)

    def _mark(self, layers: Any) -> None:
        """Take down the peak when backward comes to the last layer but one, and when it comes to the first."""

        def note_last(*_: Any) -> None:
            self._last = max(self._last, self._ledger.settle())

        def forget(*_: Any) -> None:
            self._ledger.settle()

        if len(layers) > 1:
            layers[-2].register_full_backward_pre_hook(note_last)
            layers[0].register_full_backward_pre_hook(forget)

    def _loss(self) -> torch.Tensor:
        pairs = self._training.method == "dpo"
        rows, length = self._load.rows * (2 if pairs else 1), self._load.length
        batch = _batch(rows, length, has_mask=self._load.padded and not self._training.packing)
        self._trainable.begin([max(1, length // 2)] * rows)
        # CPU's autocast, since fake tensors of CUDA need CUDA; it casts the same products
        with torch.autocast("cpu", torch.bfloat16, enabled=self._machine.device == "cuda"):
            if pairs:
                return pair_losses(self._trainable, batch, self._training.dpo_beta)
            return token_losses(self._trainable.model, batch).sum()


def _batch(rows: int, length: int, has_mask: bool) -> Batch:
    ids = torch.zeros(rows, length, dtype=torch.int64)
    mask = torch.ones_like(ids) if has_mask else None
    return Batch(ids, ids.clone(), ids.clone(), mask, rows * length, rows * length)


def _optimizer(training: Training, weights: Mapping[str, nn.Parameter], machine: Machine) -> Any:
    if training.optimizer != "adamw" and machine.device == "cuda":
        return _Moments8bit(list(weights.values()), paged=training.optimizer.startswith("paged"))
    optimizer = make_optimizer(training, weights, plus_ratio(training))
    for group in optimizer.param_groups:
        group["foreach"] = machine.device == "cuda"  # torch's choice there: all parameters in one launch
    return optimizer


class _Moments8bit:
    """The tensors of bitsandbytes' 8-bit AdamW, whose update is in place."""

    def __init__(self, weights: Sequence[nn.Parameter], paged: bool) -> None:
        self._weights, self._paged = weights, paged
        self._moments: list[torch.Tensor] = []

    def step(self) -> None:
        if self._moments:
            return
        for weight in self._weights:
            count = weight.numel()
            if count < _SMALLEST_8BIT:
                self._moments += [torch.zeros(count) for _ in range(2)]
            elif (
                not self._paged or count < _SMALLEST_PAGED
            ):  # pages are managed memory, on the host when need be
                self._moments += [torch.zeros(count, dtype=torch.uint8) for _ in range(2)]
            if count >= _SMALLEST_8BIT:
                self._moments += [torch.zeros(math.ceil(count / _BLOCK_8BIT)) for _ in range(2)]

    def zero_grad(self, set_to_none: bool) -> None:
        for weight in self._weights:
            weight.grad = None


# ---- fake tensors -------------------------------------------------------------------------------


class _Resident(nn.Module):
    """A linear of the base, by its shape: its weight is made whenever it is asked for, as dequantization does."""

    def __init__(self, linear: nn.Linear, quantization: str) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._quantization, self._dtype = quantization, linear.weight.dtype

    @property
    def weight(self) -> torch.Tensor:
        shape = self.out_features, self.in_features
        if self._quantization == "int8":  # by `dequantized` of engine/packed.py, in float32
            return torch.empty(shape) * 1.0 / 127
        return torch.empty(shape, dtype=self._dtype)


def _view(config: Any, machine: Machine, ledger: Ledger) -> Any:
    """What `trainable_view` makes of a base, without a base. Its own tensors are none of the ledger's."""
    config = copy.deepcopy(config)
    config.use_cache = False
    view: Any = AutoModelForCausalLM.from_config(
        config, dtype=machine.dtype, attn_implementation="sdpa", trust_remote_code=False
    )
    ledger.ignore([*view.parameters(), *view.buffers()])
    quantized = dict(quantized_linears(view)) if machine.quantization != "none" else {}
    for name, linear in list(view.named_modules()):
        if isinstance(linear, nn.Linear):
            resident = _Resident(linear, machine.quantization) if name in quantized else linear
            parent, _, attribute = name.rpartition(".")
            frozen = FrozenLinear(
                resident, machine.dtype, None if linear.bias is None else linear.bias.detach()
            )
            setattr(view.get_submodule(parent), attribute, frozen)
            resident.requires_grad_(False)
    view.requires_grad_(False)
    view.train()
    return view


@contextmanager
def _replaceable_parameters() -> Iterator[None]:
    """`Module.to` swaps fake parameters in place, which fails on those that somebody watches: put in new ones."""
    original = nn.Module._apply

    def apply(module: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
        for child in module.children():
            apply(child, function)
        with torch.no_grad():
            for name, each in module._parameters.items():
                if each is not None and (changed := function(each)) is not each:
                    module._parameters[name] = nn.Parameter(changed, each.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = function(buffer)
        return module

    nn.Module._apply = apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = original  # type: ignore[method-assign]


@contextmanager
def _masks(packed: bool) -> Iterator[None]:
    """transformers looks for packed rows in the numbers of positions, which fake ones do not have: say it."""
    original = masking_utils.find_packed_sequence_indices
    if not packed:
        masking_utils.find_packed_sequence_indices = lambda _: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original


# ---- ledger -------------------------------------------------------------------------------------


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that operations under it make, each until it is freed, and their work."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = self.peak = 0
        self.work = Work()
        self._known: dict[int, weakref.ref[Any]] = {}  # by id, while the storage lives

    def ignore(self, tensors: Sequence[torch.Tensor]) -> None:
        """These are not counted."""
        for tensor in tensors:
            self._watch(tensor, 0)

    def settle(self) -> int:
        """The peak since the last call."""
        peak, self.peak = self.peak, self.alive
        return peak

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # more often than all operations
            return args[0].fake_device
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype is torch.bool:
            return True  # PEFT's LoHa and LoKr ask whether a random number spares the module
        result = func(*args, **kwargs)
        if func.namespace == "prim":  # a question about a tensor
            return result
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor):
                self._watch(each, each.untyped_storage().nbytes())
        self.work += _work(func, args, kwargs, result)
        return result

    def _watch(self, tensor: torch.Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return

        def freed(_: Any) -> None:
            del self._known[key]
            self.alive -= size

        self._known[key] = weakref.ref(storage, freed)
        self.alive += size
        self.peak = max(self.peak, self.alive)


def _work(func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> Work:
    """By the formulas of `torch.utils.flop_counter`, which lacks the CPU's attention."""
    aten, packet = torch.ops.aten, func._overloadpacket
    count: Any = flop_registry.get(packet)
    shapes = [each.shape for each in args if isinstance(each, torch.Tensor)]
    attention: Any = None
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        attention, shapes = sdpa_flop_count, shapes[:3]
    elif packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        attention, shapes = sdpa_backward_flop_count, shapes[:4]
    if attention is not None:
        return Work(products=attention(*shapes))
    if count is not None:
        return Work(products=count(*args, **kwargs, out_val=result))
    if func.is_view:
        return Work()
    tensors = [each for each in tree_leaves((args, kwargs, result)) if isinstance(each, torch.Tensor)]
    return Work(moved=sum(each.numel() * each.element_size() for each in tensors))
