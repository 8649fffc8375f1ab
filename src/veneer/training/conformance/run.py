"""Conformance: each kind of adapter, made by its own library, is served and compared with that library.

Every case's adapter is saved by its library into a store of its own. One engine then serves it

    alone    whole prompts of three lengths in one pass, no other adapter in the step
    cache    the prompt's first page from the prefix cache, then token by token through the KV cache, alone
    batch    in one batch with all other adapters and with the base, prompts in chunks beside decoding rows

and a second engine serves such a batch on NF4. The reference is the library's model in float32 on the CPU,
loaded from the same files; for NF4 it is given the base's dequantized weights, because many libraries cannot run
on a quantized base. An error is max |ours - reference| / max |reference| over log probabilities. On CUDA the
batch runs once more with CUDA graphs and is compared with the eager one.

Each adapter is also served with 1 % of noise on the numbers of its file. Where that stays within the tolerance
the case could not tell a right adapter from a wrong one, and fails.
"""

from __future__ import annotations

import copy
import fnmatch
import hashlib
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from veneer.adapters.names import adapter_key
from veneer.adapters.registry import REFUSED
from veneer.engine.base import resolve_device
from veneer.engine.config import EngineConfig
from veneer.errors import InvalidRequest
from veneer.training.conformance.cases import CONTINUATION, PROMPT, Case, add_noise, collect, tiny_base
from veneer.training.conformance.serving import Asked, Served

TOLERANCE = 1e-5  # float32
NF4_TOLERANCE = {"cpu": 1e-5, "cuda": 0.1}  # it computes in float32 on the CPU and in bfloat16 on CUDA
NOISE = 0.01
BATCH_PROMPT = PROMPT[5:] + PROMPT[:5]  # one that the prefix cache does not have


class Row(msgspec.Struct, kw_only=True):
    """A line of the table. Errors are relative; None was not measured."""

    method: str
    kind: str
    primitives: list[str] = []
    portability: str | None = None
    rank: int | None = None
    bytes: int | None = None  # on the device, in float32
    alone: float | None = None
    batch: float | None = None
    cache: float | None = None
    nf4: float | None = None
    graphed: float | None = None
    control: float | None = None  # with noise on the file; None where that was refused
    verdict: str = "pass"  # pass | fail | refused
    reason: str | None = None

    def fail(self, reason: str) -> None:
        """The first reason stays."""
        self.verdict, self.reason = "fail", self.reason or reason


class _Subject:
    """A case, or the base by itself, on its way through the checks."""

    def __init__(self, case: Case, store: Path) -> None:
        self.case, self.row = case, Row(method=case.method, kind=case.kind)
        self.is_open = True  # False: it could not be made or is refused, so there is nothing to measure
        self.key = None if case is _BASE_CASE else adapter_key(_digest(case.method), case.task)
        self.noisy = _digest(f"{case.method} with noise")
        self.folder, self.noisy_folder = (
            store / "blobs" / digest for digest in (_digest(case.method), self.noisy)
        )

    def end(self, reason: str) -> None:
        self.is_open = False
        self.row.fail(reason)


_BASE_CASE = Case("(base)", "base", make=lambda model: model, load=lambda model, folder: model)
_References = Mapping[str, torch.Tensor]  # by method


def run(base: Path | None, only: str = "*", device: str = "auto") -> list[Row]:
    """Check the cases whose method or kind matches the pattern `only`; then the kinds that are refused as such.

    Raises:
        InvalidRequest: nothing matches.
    """
    chosen = [case for case in collect() if _matches(only, case.method, case.kind)]
    refused = [
        Row(method=kind, kind=kind, verdict="refused", reason=reason)
        for kind, reason in sorted(REFUSED.items())
        if _matches(only, kind)
    ]
    if not chosen and not refused:
        raise InvalidRequest(f"--only {only!r} matches no method; docs/adapters.md lists them", param="only")
    return [*(check(chosen, base, device) if chosen else []), *refused]


def check(cases: Sequence[Case], base: Path | None, device: str) -> list[Row]:
    """The row of the base, then that of each case, on the tiny base or the model in a folder.

    Progress goes to the terminal.
    """
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="veneer-conformance-") as temporary:
        root = Path(temporary)
        if base is None:
            base = root / "base"
            tiny_base(base)
        return _Check(base, root / "store", device).run(cases)


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """max |ours - reference| / max |reference|, where `ours` is known (not NaN)."""
    known = ~ours.isnan()
    if not known.any():
        return float("inf")
    return float((ours - reference)[known].abs().max() / reference[known].abs().max())


class _Check:
    """One run over one base."""

    def __init__(self, base: Path, store: Path, device: str) -> None:
        self.base, self.store = base, store
        self.device = resolve_device(device)
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float32, local_files_only=True
        )
        self.model.eval()

    def run(self, cases: Sequence[Case]) -> list[Row]:
        """The base's row, then one for each case."""
        base = _Subject(_BASE_CASE, self.store)
        adapters = [_Subject(case, self.store) for case in cases]
        subjects = [base, *adapters]
        for subject in _progress("make", adapters):
            self._write(subject)
        with self._engine(len(cases), "none", "float32", eager=True) as served:
            self._lower(served, adapters)
            self._alone(served, subjects, self._references("reference", subjects, self.model, PROMPT))
            expected = self._references("reference, batch", subjects, self.model, BATCH_PROMPT)
            eager = self._batch(served, subjects)
            self._judge("batch", subjects, eager, expected, TOLERANCE)
            self._control(served, adapters, expected)
        if self.device.type == "cuda":
            with self._engine(len(cases), "none", "float32", eager=False) as served:
                served.engine.finish_chores()
                self._judge("graphed", subjects, self._batch(served, subjects), eager, TOLERANCE)
        with self._engine(len(cases), "nf4", "auto", eager=False) as served:
            expected = self._references("reference, NF4", subjects, self._as_served(served), BATCH_PROMPT)
            tolerance = NF4_TOLERANCE[self.device.type]
            self._judge("nf4", subjects, self._batch(served, subjects), expected, tolerance)
        return [subject.row for subject in subjects]

    def _engine(self, adapters: int, quantization: str, dtype: str, *, eager: bool) -> Served:
        return Served(
            EngineConfig(
                model=str(self.base),
                store=str(self.store),
                device=str(self.device),
                quantization=quantization,
                dtype=dtype,
                max_loras=adapters,
                max_num_seqs=adapters + 1,
                max_num_batched_tokens=max(128, 2 * adapters),  # the prompts of a batch have many more
                enforce_eager=eager,
            )
        )

    def _as_served(self, served: Served) -> Any:
        """The library's base with the weights that the engine serves, dequantized."""
        model = copy.deepcopy(self.model)
        for site in served.engine.base.sites:
            model.get_submodule(site).weight.data.copy_(served.engine.base.weight(site))
        return model

    def _write(self, subject: _Subject) -> None:
        try:
            subject.case.write(self.model, subject.folder)
            add_noise(subject.folder, subject.noisy_folder, NOISE)
        except Exception as error:  # whatever a library raises belongs to its own row
            subject.end(f"its library could not make it: {type(error).__name__}: {error}")

    def _references(
        self, what: str, subjects: Sequence[_Subject], model: Any, prompt: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """The library's log probabilities [continuation, vocabulary] of each open subject."""
        found = {}
        tokens = [*prompt, *CONTINUATION[:-1]]
        for subject in _progress(what, _open(subjects)):
            try:
                every = subject.case.reference(model, subject.folder, tokens, len(prompt))
            except Exception as error:
                subject.end(f"its library could not run it: {type(error).__name__}: {error}")
            else:
                found[subject.case.method] = every[len(prompt) - 1 :]
        return found

    def _lower(self, served: Served, subjects: Sequence[_Subject]) -> None:
        """Have the adapters checked as an upload is; what lowering finds out goes to the rows."""
        checked = served.check({_digest(each.case.method): each.folder for each in _open(subjects)})
        for subject in _open(subjects):
            row, answer = subject.row, checked[_digest(subject.case.method)]
            if answer.error is not None:
                subject.end(answer.error.message)
                row.verdict = "refused" if subject.case.refused else "fail"
            elif subject.case.refused:
                subject.end("it cannot be served exactly, and was not refused")
            elif info := answer.info:
                row.primitives, row.rank, row.bytes = info.primitives, info.rank, info.bytes
                row.portability = info.portability

    def _alone(self, served: Served, subjects: Sequence[_Subject], references: _References) -> None:
        """Each subject by itself: in one pass first, so that its pages are not in the prefix cache."""
        lengths = [0, len(CONTINUATION) // 2, len(CONTINUATION) - 1]
        expected = {name: each[lengths] for name, each in references.items()}
        whole, cached = {}, {}
        for subject in _progress("serve alone", _open(subjects)):
            prompts = [
                Asked(subject.key, PROMPT + CONTINUATION[:n], CONTINUATION[n : n + 1]) for n in lengths
            ]
            answers = served.ask(prompts)
            if subject.case.run_prompt is not None:  # each of these prompts ends elsewhere
                lasts = [
                    subject.case.reference(self.model, subject.folder, asked.prompt)[-1] for asked in prompts
                ]
                expected[subject.case.method] = torch.stack(lasts)
            known = [each for each in answers if isinstance(each, torch.Tensor)]
            whole[subject.case.method] = torch.cat(known) if len(known) == len(answers) else answers[0]
            [cached[subject.case.method]] = served.ask([Asked(subject.key, PROMPT, CONTINUATION)])
        self._judge("alone", subjects, whole, expected, TOLERANCE)
        self._judge("cache", subjects, cached, references, TOLERANCE)

    def _batch(self, served: Served, subjects: Sequence[_Subject]) -> dict[str, torch.Tensor | str]:
        asked = {each.case.method: Asked(each.key, BATCH_PROMPT, CONTINUATION) for each in _open(subjects)}
        return dict(zip(asked, served.ask(list(asked.values())), strict=True))

    def _control(self, served: Served, subjects: Sequence[_Subject], references: _References) -> None:
        """The noisy copies in one batch. One that is refused is seen too."""
        noisy = {each.noisy: each for each in _open(subjects)}
        checked = served.check({digest: each.noisy_folder for digest, each in noisy.items()})
        taken = [digest for digest, answer in checked.items() if answer.error is None]
        keys = [adapter_key(digest, noisy[digest].case.task) for digest in taken]
        answers = served.ask([Asked(key, BATCH_PROMPT, CONTINUATION) for key in keys])
        for digest, answer in zip(taken, answers, strict=True):
            row = noisy[digest].row
            if isinstance(answer, str):
                row.fail(f"control: {answer}")
                continue
            row.control = relative_error(answer, references[row.method])
            if row.control <= TOLERANCE:
                row.fail(
                    f"control: {NOISE:.0%} of noise on its file moves the output by {row.control:.1e} alone"
                )

    def _judge(
        self,
        column: str,
        subjects: Sequence[_Subject],
        answers: Mapping[str, torch.Tensor | str],
        references: Mapping[str, torch.Tensor | str],
        tolerance: float,
    ) -> None:
        """Fill a column of the rows, and fail those above the tolerance."""
        for row in (subject.row for subject in subjects):
            if row.method not in answers or row.method not in references:
                continue  # ended before
            answer, reference = answers[row.method], references[row.method]
            if isinstance(answer, str) or isinstance(reference, str):
                row.fail(f"{column}: {answer if isinstance(answer, str) else reference}")
                continue
            error = relative_error(answer, reference)
            setattr(row, column, error)
            if not error <= tolerance:
                row.fail(f"{column}: the error {error:.1e} is above {tolerance:.0e}")


def _matches(only: str, *names: str) -> bool:
    return any(fnmatch.fnmatchcase(name.lower(), only.lower()) for name in names)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _open(subjects: Iterable[_Subject]) -> list[_Subject]:
    return [subject for subject in subjects if subject.is_open]


def _progress(what: str, subjects: Sequence[_Subject]) -> Iterable[_Subject]:
    """On a terminal only."""
    bar: Iterable[_Subject] = tqdm(subjects, what, leave=False, disable=None)
    return bar
