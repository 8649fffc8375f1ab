"""What the HTTP process and the engine process say to each other.

One msgspec struct per message, encoded as msgpack. Imports no torch: the HTTP process uses this file.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class Constraint(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the text of an output must be, whole. See engine/grammars.py."""

    grammar: str  # llguidance's Lark
    param: str = "structured_outputs"  # the field that asked for it; errors name it
    tokenizer: str | None = None  # digest of the adapter whose tokenizer writes the text; None = the base's
    end_tokens: tuple[int, ...] = ()  # that end its text, beside those of the base


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose the next tokens of one sequence. Values are already validated by the server."""

    max_tokens: int  # 0: the prompt alone is computed
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = no limit
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int = 0  # always set; the server draws one when the request has none
    min_tokens: int = 0
    stop_token_ids: list[int] = []  # end the sequence; the stop token is part of the output tokens
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; k: the chosen token and the k most likely
    constraint: Constraint | None = None  # comes without min_tokens and ignore_eos
    prompt_logprobs: int | None = None  # the same of each token of the prompt but the first
    pooling: Literal["mean", "last"] | None = None  # a vector of the prompt instead; with max_tokens 0
    dimensions: int | None = None  # of that vector, which is cut before it is scaled; None: all
    draft_tokens: int = (
        0  # at most, that a step drafts by lookup in the prompt, output and prediction; 0: none
    )
    prediction: list[int] = []  # what the output may repeat


# ---- HTTP -> engine -------------------------------------------------------------------------------


class Generate(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Queue one sequence. Answered by `SequenceOutput`s until one has `finish_reason` or `error`."""

    id: str
    prompt: list[int]
    sampling: SamplingParams
    adapter: str | None = None  # key of adapters/names.py; None = the base
    deadline: float | None = None  # seconds from receipt


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Stop a sequence. No further output for `id` follows."""

    id: str


class CheckAdapter(msgspec.Struct, frozen=True, tag=True):
    """Lower the adapter in `folder`, each task of it, and keep the result. Answered by `AdapterChecked`.

    One that does not change the output of a fixed prompt is refused unless `allow_ineffective`.
    """

    call: str
    folder: str
    digest: str
    allow_ineffective: bool = False


class CheckBlend(msgspec.Struct, frozen=True, tag=True):
    """Put stored adapters together as the key says, and keep the result. Answered by `AdapterChecked`."""

    call: str
    key: str  # of adapters/recipes.py


class MergeAdapters(msgspec.Struct, frozen=True, tag=True):
    """Write what a recipe makes of stored adapters into an empty folder, as an adapter's two files.

    Answered by `MergeProgress`, then `Merged`. Merges run one after the other, beside the steps.
    """

    call: str
    key: str  # of adapters/recipes.py
    folder: str
    keep_rows: bool = False  # of products: without it, directions that are noise are left out


class CancelMerge(msgspec.Struct, frozen=True, tag=True):
    """End a merge at its next site; its `Merged` says so, unless it was done before. Not answered by itself."""

    call: str


class DropAdapter(msgspec.Struct, frozen=True, tag=True):
    """Forget an adapter with all its tasks on host and device once no sequence uses it. Answered by `Done`."""

    call: str
    digest: str


class PinAdapter(msgspec.Struct, frozen=True, tag=True):
    """Keep an adapter on the device (or stop keeping it). Answered by `Done`."""

    call: str
    key: str  # of adapters/names.py
    pinned: bool


class StartJob(msgspec.Struct, frozen=True, tag=True):
    """Train what `folder` describes, from its last saved state if it has one. Answered by `JobReport`s.

    Jobs are queued in the order of these messages. In the folder are `training.json`, a `Training` of
    training/recipe.py, and the rows: `data/training.*`, perhaps `data/validation.*`; all else is the engine's.
    Reports of an earlier run may be lost: what the folder tells of it, steps, checkpoints and perhaps the end, is
    reported again in order, and the receiver knows by job and step what it has.
    """

    id: str
    folder: str


class StopJob(msgspec.Struct, frozen=True, tag=True):
    """End a job before its end, or take it out of the queue. Answered by a `JobReport` "stopped".

    Its state stays in the folder, from which `StartJob` goes on.
    """

    id: str


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """End the engine process now. The server drains first."""


Request = (
    Generate
    | Cancel
    | CheckAdapter
    | CheckBlend
    | MergeAdapters
    | CancelMerge
    | DropAdapter
    | PinAdapter
    | StartJob
    | StopJob
    | Shutdown
)


# ---- engine -> HTTP -------------------------------------------------------------------------------


class WireError(msgspec.Struct, frozen=True):
    """A `VeneerError` as plain values (see `veneer.errors.from_wire`)."""

    status: int
    code: str
    message: str
    param: str | None = None


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log probabilities of a token and its rivals, from the raw logits (before temperature and penalties)."""

    logprob: float  # of the token: the chosen one, or the prompt's
    top_ids: list[int]
    top_logprobs: list[float]
    rank: int  # of the token among all, 1 for the likeliest


class SequenceOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """News of one sequence after one step."""

    id: str
    prompt_logprobs: list[
        TokenLogprobs
    ] = []  # of the prompt's second token and on, in pieces, before all tokens
    tokens: list[int] = []
    logprobs: list[TokenLogprobs] = []  # one for each token when asked for
    finish_reason: str | None = None  # "stop" | "length"
    stop_token: int | None = None  # the token that ended the sequence, when one did
    error: WireError | None = None
    cached_tokens: int = 0  # prompt tokens served from the prefix cache
    drafted: int = 0  # tokens that this step drafted
    accepted: int = 0  # of these, those that are among `tokens`
    pooled: bytes = b""  # float32 [dimensions] of length 1, at the end of a sequence that pools


class Outputs(msgspec.Struct, frozen=True, tag=True):
    """Everything one step produced."""

    items: list[SequenceOutput]


class SiteInfo(msgspec.Struct, frozen=True, array_like=True):
    """A linear layer of the base that adapters can target."""

    name: str
    in_features: int
    out_features: int


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine serves with; shown by /health."""

    model_type: str
    device: str
    device_name: str
    dtype: str
    quantization: str
    kernels: str  # "triton" | "torch"
    base_bytes: int  # resident weights of the base
    vocab_size: int
    hidden_size: int
    max_model_len: int
    eos_token_ids: list[int]
    num_pages: int
    page_size: int
    max_loras: int
    max_lora_rank: int
    adapter_memory: int  # bytes of the device arena
    host_adapter_memory: int
    notes: list[str] = []  # fallbacks and limits that took effect, in words


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The base is loaded and requests can be served."""

    info: EngineInfo


class AdapterInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What lowering an adapter found out."""

    kind: str  # "lora"
    primitives: list[str]  # ["low_rank", "bias"]
    rank: int  # the largest rank over its sites
    sites: int
    bytes: int  # on the device, in the engine's dtype; of one task
    portability: str = "independent"  # of the base's weights, or "proportional" to them
    tasks: int = 0  # a request names one of them; 0: it knows no tasks
    added_tokens: int = 0  # beyond the base's vocabulary, for which it brings rows
    virtual_tokens: int = 0  # in front of each prompt: they take positions and KV cache
    base_model: str = ""  # what the config calls its base
    effect: float | None = None  # largest change of a log probability of the probe prompt
    error: float | None = (
        None  # of a blend that was cut to a rank: what its products lost, relative (Frobenius)
    )
    warnings: list[str] = []


class AdapterChecked(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    call: str
    info: AdapterInfo | None = None
    error: WireError | None = None


class MergeProgress(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    call: str
    done: int  # sites
    total: int


class Merged(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The files are written, unless there is an error."""

    call: str
    distance: float | None = None  # from the exact sum of the weighted changes, relative (Frobenius)
    warnings: list[str] = []
    error: WireError | None = None


class Done(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    call: str
    error: WireError | None = None


class JobReport(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """News of a training job, in their order.

    kind        data
    validated   rows, tokens, ... (the data report); its steps begin
    progress    step, total_steps, train_loss, learning_rate; tokens and seconds so far; now and then valid_loss
    checkpoint  step, folder (of a complete adapter), train_loss, perhaps valid_loss
    notice      nothing: `message` says what happened (a fallback, an early end, a resumption)
    succeeded   step, tokens, folder (of the result), gate {passed, ...} if there is one, what report.json has
    failed      nothing: `error` says why. The job is over
    stopped     step; after `StopJob`
    """

    id: str
    kind: str
    message: str = ""
    data: dict[str, Any] = {}
    error: WireError | None = None


class AdapterStats(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One adapter's residency and lifetime counts."""

    device: bool = False
    host: bool = False
    pinned: bool = False
    running: int = 0
    waiting: int = 0
    loads: int = 0  # host -> device copies
    evictions: int = 0  # device evictions

    def __add__(self, other: AdapterStats) -> AdapterStats:
        """Of several tasks of one adapter: where any is, and how much there is of all."""
        return AdapterStats(
            device=self.device or other.device,
            host=self.host or other.host,
            pinned=self.pinned or other.pinned,
            running=self.running + other.running,
            waiting=self.waiting + other.waiting,
            loads=self.loads + other.loads,
            evictions=self.evictions + other.evictions,
        )


class HotAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """The merged copy of the adapter that dominates (engine/hot.py). Totals count since engine start."""

    state: str  # "watching" | "making" | "checking" | "serving" | "leaving"
    format: str  # "full" | "nf4"
    adapter: str | None = None  # key of adapters/names.py; None while watching
    bytes: int = 0  # of the copy; 0 without one
    error: float | None = None  # of its weights, relative (Frobenius)
    lost: float | None = None  # the same distance over the size of what the adapter changes
    logprob_difference: float | None = None  # on the probe's prompt, from the adapter without the copy
    tokens_per_second_before: float | None = None  # of rounds of the same size, busy time; None until known
    tokens_per_second: float | None = None
    steps: int = 0  # of copies
    made: int = 0
    dropped: dict[str, int] = {}  # by reason
    note: str = ""  # why there is no copy, or no more


class Stats(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A snapshot for /metrics, sent at most a few times a second. Totals count since engine start."""

    running: int
    waiting: int
    pages_used: int
    pages_total: int
    steps: int
    eager_steps: int  # those without a CUDA graph
    prefill_tokens: int
    decode_tokens: int
    draft_tokens: int
    accepted_draft_tokens: int
    prefix_hit_tokens: int
    prefix_query_tokens: int
    preemptions: int
    adapters: dict[str, AdapterStats]  # by digest, all tasks together
    device_adapter_bytes: int
    host_adapter_bytes: int
    hot_adapter: HotAdapter | None = None  # None: --hot-adapter-memory is 0


Reply = Ready | Outputs | AdapterChecked | MergeProgress | Merged | Done | JobReport | Stats

request_decoder = msgspec.msgpack.Decoder(Request)
reply_decoder = msgspec.msgpack.Decoder(Reply)
encoder = msgspec.msgpack.Encoder()
