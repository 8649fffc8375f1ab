"""What options of a request cost in decode steps: op `options`, the same batch with and without them, in turn.

python -m benchmarks.options [--shapes 8b|packaged|tiny] [--cases json,blend4] [--output benchmarks/results]

* `json`, `regex`, `choice`: structured outputs of the base beside its plain ones, where a step is shortest.
* `blend2`, `blend4`, `blend8`: blends of so many LoRAs of rank 16, two for the batch, beside the LoRAs of the
  summed rank that compute the same.
* `edit`, `novel`, each for 1, 4 and 32 requests (`edit/4`): drafts of 10 tokens beside none. Of an edit nine of ten
  tokens are in the prediction; what is novel is drawn at temperature 1 and only by chance repeats what was there.
  `copy`, with the packaged base alone: the prompt has a text twice, and the base goes on with it.

All rows of the batch have the option. A round takes all in turn, every second one backwards; a row has the medians
of the rounds, and of the ratios within them, of the time in which the batch gets one token each. Before anything is
timed answers are checked: each token must follow the grammar, or be what the LoRA of the summed rank gives. With
drafts it is told how many answers are the same: the last bits of logits hang on the rows of a step. Greedy but for
`novel`; prompts, adapters and, but for `packaged`, the base are random.

On a GPU times are wall times. On a CPU they are the processor's time, of all threads of the process: what other
programs take from it is not in them, and what runs beside the steps, such as the masks of grammars, is.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from benchmarks.device import Ceilings, Row, device_name, measure_ceilings, print_rows, write_report
from benchmarks.engines import digest, generate, program_bytes, random_engine, step_bytes, step_outputs
from benchmarks.models import RANK, SHAPES, make_base, random_program, write_subword_tokenizer
from tokenizers import Tokenizer

from veneer.adapters.program import Program, SiteProgram
from veneer.adapters.recipes import Part, recipe
from veneer.engine.base import Base
from veneer.engine.engine import Engine
from veneer.engine.grammar_text import choice_body, json_body, lark, regex_body
from veneer.engine.messages import Constraint, Generate
from veneer.engine.source import resolve

BLENDS = (2, 4, 8)  # adapters in one
DISTINCT = 2  # blends of a case
PERSON = {
    "name": {"type": "string", "minLength": 1, "maxLength": 40},
    "age": {"type": "integer", "minimum": 0, "maximum": 120},
    "email": {"type": "string", "format": "email"},
    "role": {"enum": ["owner", "editor", "reader"]},
    "active": {"type": "boolean"},
    "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4},
}
WORDS = ["they", "wash", "a", "warm", "coat", "while", "the", "pilot", "reads", "another", "letter"]


def strict(properties: Mapping[str, Any]) -> dict[str, Any]:
    """A schema as `strict` asks for it."""
    required = list(properties)
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


# None of them can end before the answers do.
PEOPLE = strict({"people": {"type": "array", "items": strict(PERSON), "minItems": 1000}})
CHOICES = [f"{first}: " + " ".join(islice(cycle(WORDS[first:]), 1000)) for first in range(len(WORDS))]
GRAMMARS = {
    "json": json_body(PEOPLE, "response_format"),
    "regex": regex_body("([A-Z]{2}[0-9]{4} (open|closed|lost)\n){1000}"),
    "choice": choice_body(CHOICES),
}
DRAFT = 10  # tokens
DRAFTED_BATCHES = (1, 4, 32)
DRAFTS = [f"{task}/{batch}" for task in ("edit", "novel") for batch in DRAFTED_BATCHES]
COPIES = [f"copy/{batch}" for batch in DRAFTED_BATCHES]
BLEND_CASES = [f"blend{count}" for count in BLENDS]
CASES = [*GRAMMARS, *BLEND_CASES, *DRAFTS]
TEXT = (
    "The pilot reads a letter before the flight. It says that the harbour is closed, that two ships wait outside, "
    "and that nobody knows when the storm will end. She folds it and walks to the old tower on the hill.\n\n"
)


class Option(NamedTuple):
    """What the requests of a batch ask for."""

    batch: int
    adapters: tuple[str, ...] = ()  # keys, which they take turns on
    constraint: Constraint | None = None
    task: str = ""  # edit, novel or copy
    drafts: int = 0  # tokens


class Run(NamedTuple):
    step_us: float  # in which the whole batch gets one token each, on average
    answers: dict[str, list[int]]  # tokens by request
    accepted: float  # of the tokens that were drafted


class Case(NamedTuple):
    name: str
    peer_name: str
    peer: Option
    option: Option
    adapter_bytes: int = 0  # of all its adapters


class Bench:
    """The engine, and what its requests say."""

    def __init__(self, engine: Engine, prompt: int, output: int, text: list[int]) -> None:
        """prompt, output: tokens. text: what is copied."""
        self.engine, self._prompt, self._output, self._text = engine, prompt, output, text
        self._answers: dict[str, list[int]] = {}  # by request, of edits without drafts

    def run(self, option: Option) -> Run:
        """Answer a batch; its requests have the same names and prompts each time."""
        engine = self.engine
        clock = time.perf_counter if engine.base.device.type == "cuda" else time.process_time
        drafted, accepted = engine.draft_tokens, engine.accepted_draft_tokens
        for index in range(option.batch):
            engine.handle(self._request(index, option))
        answers: dict[str, list[int]] = {}
        seen: list[tuple[float, int]] = []  # time and tokens so far, once all have begun
        while engine.has_work:
            for item in step_outputs(engine):
                answers.setdefault(item.id, []).extend(item.tokens)
            if len(answers) == option.batch:
                seen.append((clock(), sum(map(len, answers.values()))))
        (start, before), (end, after) = seen[0], seen[-1]
        drafted, accepted = engine.draft_tokens - drafted, engine.accepted_draft_tokens - accepted
        step_us = (end - start) * 1e6 * option.batch / (after - before)
        return Run(step_us, answers, accepted / drafted if drafted else 0.0)

    def check(self, case: Case) -> float:
        """Load and compile what the case needs. The part of the answers that are what they must be."""
        found = self.run(case.peer).answers
        if case.option.task == "edit":
            self._answers |= found
        right = 0
        for name, tokens in self.run(case.option).answers.items():
            if case.option.constraint is None:
                right += tokens == found[name]
            else:
                matcher = self.engine.grammars.matcher(case.option.constraint)
                right += matcher.advance(tokens) is not None
        if right < case.option.batch and not case.option.drafts:
            raise RuntimeError(f"{case.name}: {case.option.batch - right} of the answers are wrong")
        return right / case.option.batch

    def _request(self, index: int, option: Option) -> Generate:
        plain = generate("r", index, self.engine.base.config.vocab_size, self._prompt, self._output, None)
        return msgspec.structs.replace(
            plain,
            adapter=option.adapters[index % len(option.adapters)] if option.adapters else None,
            prompt=[*self._text[index:], *self._text, *self._text] if option.task == "copy" else plain.prompt,
            sampling=msgspec.structs.replace(
                plain.sampling,
                constraint=option.constraint,
                temperature=1.0 if option.task == "novel" else 0.0,
                seed=index,
                draft_tokens=option.drafts,
                prediction=edited(self._answers.get(plain.id, [])) if option.drafts else [],
            ),
        )


def edited(tokens: Sequence[int]) -> list[int]:
    """Every tenth token is another one."""
    return [token ^ 1 if place % 10 == 9 else token for place, token in enumerate(tokens)]


# ---- what is compared ----------------------------------------------------------------------------


def summed(loras: Sequence[Program], factors: Sequence[float]) -> Program:
    """The LoRA of the summed rank that is their weighted sum."""
    sites = {}
    for name in loras[0].sites:
        found = [lora.sites[name] for lora in loras]
        a = torch.cat([each.a for each in found if each.a is not None])
        b = [factor * each.b for factor, each in zip(factors, found, strict=True) if each.b is not None]
        sites[name] = SiteProgram(a, torch.cat(b))
    return Program(kind="lora", sites=sites)


def make_cases(base: Base, names: Sequence[str], batch: int) -> tuple[list[Case], list[Program]]:
    """The cases, and the adapters that they name by their place in the list."""
    ends = () if base.eos_token_ids else (0,)  # some token must be able to end a text
    counts = {name: count for name, count in zip(BLEND_CASES, BLENDS, strict=True) if name in names}
    programs = [random_program(base) for _ in range(max(counts.values(), default=1))]
    cases = []
    for name in names:
        if name in GRAMMARS:
            constraint = Constraint(grammar=lark(GRAMMARS[name]), end_tokens=ends)
            cases.append(Case(name, "plain", Option(batch), Option(batch, constraint=constraint)))
        elif name in counts:
            cases.append(make_blends(base, name, counts[name], batch, programs))
        else:
            task, _, requests = name.partition("/")
            plain = Option(int(requests), task=task)
            cases.append(Case(name, "no drafts", plain, plain._replace(drafts=DRAFT)))
    return cases, programs


def make_blends(base: Base, name: str, count: int, batch: int, programs: list[Program]) -> Case:
    """Blends of the first `count` programs; the LoRAs that compute the same are added to these."""
    blends, sums = [], []
    for number in range(DISTINCT):
        factors = [2.0 ** -(part % 3 + number) for part in range(count)]  # so that nothing is rounded
        key = recipe([Part(digest(i), factor) for i, factor in enumerate(factors)]).key
        assert key is not None  # it has parts
        blends.append(key)
        sums.append(digest(len(programs)))
        programs.append(summed(programs[:count], factors))
    size = program_bytes(base, *programs[-DISTINCT:])
    peer, option = Option(batch, tuple(sums)), Option(batch, tuple(blends))
    return Case(name, f"LoRA of rank {RANK * count}", peer, option, size)


def measure(args: argparse.Namespace, ceilings: Ceilings) -> list[Row]:
    base = make_base(args.shapes, args.layers)
    cases, programs = make_cases(base, args.cases.split(","), args.batch)
    options = list(dict.fromkeys(option for case in cases for option in (case.peer, case.option)))
    taken: dict[Option, list[Run]] = {option: [] for option in options}
    widest = max(option.batch for option in options)
    model = resolve(None)
    text = Tokenizer.from_file(str(model / "tokenizer.json")).encode(TEXT).ids
    prompt = max(args.prompt, 3 * len(text) if args.shapes == "packaged" else 0)
    with tempfile.TemporaryDirectory() as store:
        if args.shapes != "packaged":
            model = write_subword_tokenizer(Path(store), base.config.vocab_size)
        engine = random_engine(
            Path(store),
            base,
            len(programs),
            slots=2 * DISTINCT * len(BLENDS),
            batch=2 * widest,  # as many tokens a step may choose, those of drafts included
            programs=programs,
            model=str(model),
            kv_tokens=widest * (prompt + args.tokens + DRAFT + 32),
        )
        try:
            engine.finish_chores()
            bench = Bench(engine, args.prompt, args.tokens, text)
            right = {case.name: bench.check(case) for case in cases}
            for number in range(args.rounds):
                for option in options[:: -1 if number % 2 else 1]:
                    taken[option].append(bench.run(option))
                print(f"round {number + 1} of {args.rounds}", flush=True)
        finally:
            engine.close()
    rows = []
    for case in cases:
        read = step_bytes(base, case.option.batch, 0, args.prompt + args.tokens // 2) + case.adapter_bytes
        rows.append(
            make_row(case, taken[case.peer], taken[case.option], ceilings.floor(read), right[case.name])
        )
    return rows


def make_row(case: Case, peers: Sequence[Run], runs: Sequence[Run], floor: float, right: float) -> Row:
    peer, ours = (statistics.median(run.step_us for run in each) for each in (peers, runs))
    ratios = sorted(run.step_us / peer.step_us for run, peer in zip(runs, peers, strict=True))
    extra = {
        "ratio": statistics.median(ratios),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "tokens_per_s": case.option.batch / ours * 1e6,
    }
    if case.option.drafts:
        extra |= {"accepted": statistics.median(run.accepted for run in runs), "same_answers": right}
    print(f"{case.name:8} {ours / 1e3:8.2f} ms  {extra['ratio']:.3f} x {case.peer_name}")
    return Row("options", case.name, ours, floor, {case.peer_name: peer}, extra)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shapes", choices=[*SHAPES, "packaged"], default="8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--cases", default=",".join(CASES), help="comma-separated")
    parser.add_argument("--batch", type=int, default=32, help="requests, but for drafts")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="a folder")
    args = parser.parse_args(argv)
    known = [*CASES, *(COPIES if args.shapes == "packaged" else [])]
    if unknown := set(args.cases.split(",")) - set(known):
        parser.error(f"--cases {','.join(sorted(unknown))}: choose from {','.join(known)}")
    torch.manual_seed(0)
    ceilings = measure_ceilings()
    print(f"{device_name()}, batch {args.batch}", flush=True)
    rows = measure(args, ceilings)
    extra = {"batch": args.batch, "rounds": args.rounds, "shapes": args.shapes}
    print(f"written to {write_report(args.output, 'options', rows, extra)}")
    print_rows(rows)


if __name__ == "__main__":
    main()
