"""The decode bench: tokens a second and state memory, Mamba beside a Transformer with a KV cache.

The paper's setting (figure 8, right): a prompt, then greedy tokens for a whole batch; throughput is
batch x tokens / (prompt + decoding). Weights are random. The Transformer is given what serves it
best here, a cache allocated whole, and on a GPU CUDA graphs, as Mamba is; and, as the paper timed
it and as the suite's own layer decodes, a cache that grows by a copy of itself at every token.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from seqbench.models.backbone import Backbone
from seqbench.models.base import State
from seqbench.models.build import build_model, match_parameters
from seqbench.models.layers.attention import Attention
from seqbench.models.segments import leaves, with_leaves
from seqbench.suite.bench.result import (
    COLOURS,
    MARKERS,
    PAPER,
    GateClosed,
    Result,
    conditions,
    plain,
)
from seqbench.suite.bench.timing import capture, free, reason

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

PROMPT, TOKENS = 2048, 128
GROWING = "transformer, growing cache"
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
QUICK = (1, 16)

# Tokens a second in the paper, figure 8: A100, prompt 2048, 128 tokens.
PAPER_RATES: dict[str, dict[int, int]] = {
    "Mamba 1.4B": dict(zip(BATCHES, (140, 247, 441, 744, 1089, 1445, 1688, 1814))),
    "Transformer 1.3B": dict(zip(BATCHES, (79, 132, 199, 265, 323, 364))),
}

_SPARE = 16  # places of the cache beyond prompt and tokens: warming up uses some
_ROUNDS = 3
_STEPS_A_GRAPH = 16  # the state is copied back once a graph; divides TOKENS
# Largest difference between logits of `forward` and of decoding, over the largest logit.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


class CachedAttention(Attention):
    """Attention that decodes with keys and values in tensors allocated once, (B, H, T, W).

    `forward` with a state takes the whole prompt at once; `step` writes in place.
    """

    capacity = PROMPT + TOKENS + _SPARE
    masked = False  # attend to the whole cache through a mask: shapes that a CUDA graph can keep
    products = False  # two matrix products and a softmax in place of SDPA

    def initial_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        heads = self.config.num_heads
        shape = (batch_size, heads, self.capacity, self.width // heads)
        keys, values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        return keys, values, torch.zeros(batch_size, dtype=torch.int64, device=device)

    def forward(
        self, x_BLD: Tensor, state: State | None = None, *, reset: Tensor | None = None
    ) -> Any:
        if state is None:
            return super().forward(x_BLD, reset=reset)
        keys, values, seen_B = state
        L = x_BLD.shape[1]
        q, k, v = self._project(x_BLD, torch.arange(L, device=x_BLD.device))
        keys[:, :, :L], values[:, :, :L] = k.transpose(1, 2), v.transpose(1, 2)
        return self._attend(q, k, v), (keys, values, seen_B + L)

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        keys, values, seen_B = state
        q, k, v = self._project(x_BD[:, None], seen_B[:1])
        keys.index_copy_(2, seen_B[:1], k.transpose(1, 2))
        values.index_copy_(2, seen_B[:1], v.transpose(1, 2))
        q_BH1W, mask_T = q.transpose(1, 2), None
        if self.masked:
            mask_T = torch.arange(self.capacity, device=x_BD.device) <= seen_B[0]
        else:
            end = int(seen_B[0]) + 1
            keys, values = keys[:, :, :end], values[:, :, :end]
        if self.products:
            scores = q_BH1W @ keys.mT / q.shape[-1] ** 0.5
            if mask_T is not None:
                scores = scores.masked_fill(~mask_T, -torch.inf)
            y = scores.softmax(-1) @ values
        else:
            mask = None if mask_T is None else mask_T.expand(len(x_BD), 1, 1, -1)
            y = F.scaled_dot_product_attention(q_BH1W, keys, values, attn_mask=mask)
        y_BD = y.transpose(1, 2).flatten(1)
        return self.out_proj(y_BD), (state[0], state[1], seen_B + 1)


class _CachedByMask(CachedAttention):
    masked = True


class _CachedByProducts(CachedAttention):
    masked = products = True


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of the two models; the Transformer's width is chosen to match the parameters."""

    d_model: int
    num_layers: int
    vocab_size: int
    num_heads: int  # of the Transformer, which has half as many layers
    multiple_of: int  # of the Transformer's width
    dtype: torch.dtype
    prompts_at_once: int


CPU_SCALE = Scale(
    d_model=256,
    num_layers=8,
    vocab_size=256,
    num_heads=4,
    multiple_of=8,
    dtype=torch.float32,
    prompts_at_once=2,
)
# 1.3 B parameters, as in the paper.
CUDA_SCALE = Scale(
    d_model=2048,
    num_layers=48,
    vocab_size=50280,
    num_heads=16,
    multiple_of=128,
    dtype=torch.bfloat16,
    prompts_at_once=8,
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model at one batch size."""

    model: str
    ours: bool
    batch: int
    prompt_seconds: float | None = None  # for the whole batch
    step_seconds: float | None = None  # median, for one token of the whole batch
    tokens_timed: int = 0  # in each round
    state_bytes: int | None = None  # of the whole batch
    captured: bool = False  # as CUDA graphs
    not_run: str | None = None

    @property
    def rate(self) -> float | None:
        """Tokens a second, the prompt's time included, as the paper counts."""
        if self.prompt_seconds is None or self.step_seconds is None:
            return None
        return self.batch * TOKENS / (self.prompt_seconds + TOKENS * self.step_seconds)

    @property
    def decode_rate(self) -> float | None:
        """Tokens a second once the prompt is read."""
        return None if self.step_seconds is None else self.batch / self.step_seconds


@dataclass(frozen=True, kw_only=True)
class DecodeBench(Result):
    """What `bench_decode` found."""

    name: ClassVar[str] = "decode"
    parameters: dict[str, int]
    gate: dict[str, float]  # model -> largest difference of logits, forward and decoding
    dtype: str
    prompt: int
    rows: list[Row]

    def ratio(self, batch: int, measure: str = "rate", peer: str | None = None) -> float | None:
        """Mamba's rate over a Transformer's, by default the fastest one's."""
        at = [row for row in self.rows if row.batch == batch]
        theirs = [r for r in at if not r.ours and peer in (None, r.model)]
        best = [
            max((getattr(row, measure) or 0.0 for row in rows), default=0.0)
            for rows in ([row for row in at if row.ours], theirs)
        ]
        return best[0] / best[1] if all(best) else None

    def facts(self) -> dict[str, Any]:
        """Everything, as plain data."""
        facts = super().facts()
        for found, row in zip(facts["rows"], self.rows):
            found |= {"rate": row.rate, "decode_rate": row.decode_rate}
        batches = dict.fromkeys(row.batch for row in self.rows)
        return {
            **facts,
            "tokens": TOKENS,
            "ratios": {b: self.ratio(b) for b in batches},
            "decode_ratios": {b: self.ratio(b, "decode_rate") for b in batches},
            "ratios_to_growing_cache": {b: self.ratio(b, peer=GROWING) for b in batches},
            "paper_tokens_per_second": PAPER_RATES,
        }

    def title(self) -> str:
        """What the table shows."""
        where = f"{self.dtype}, {self.machine()}"
        return f"Decoding after a prompt of {self.prompt}, {where}: {self._sizes()}"

    def table(self) -> Table:
        """For a terminal."""
        from rich.table import Table

        table = Table(box=None, header_style="bold")
        table.add_column("batch", justify="right")
        table.add_column("")
        heads = ("tokens/s", "decode only", "prompt s", "ms a token", "state MB")
        for name in (*heads, *(f"paper: {name}" for name in PAPER_RATES)):
            table.add_column(name, justify="right")
        previous = None
        for row in self.rows:
            new = row.batch != previous
            if new and previous is not None:
                table.add_section()
            previous = row.batch
            first = str(row.batch) if new else ""
            paper = [str(r.get(row.batch, "OOM")) if new else "" for r in PAPER_RATES.values()]
            if row.rate is None or row.step_seconds is None:
                table.add_row(first, f"{row.model}: not run, {row.not_run}", *[""] * 5, *paper)
                continue
            table.add_row(
                first,
                row.model,
                f"{row.rate:.0f}",
                f"{row.decode_rate:.0f}",
                f"{row.prompt_seconds:.2f}",
                f"{1e3 * row.step_seconds:.2f}",
                f"{(row.state_bytes or 0) / 2**20:.1f}",
                *paper,
                style="bold" if row.ours else None,
            )
        return table

    def remarks(self) -> list[str]:
        """Ratios, and how it was measured."""
        lines = []
        for batch in dict.fromkeys(row.batch for row in self.rows):
            ratio, decode = self.ratio(batch), self.ratio(batch, "decode_rate")
            if ratio and decode:
                grown = self.ratio(batch, peer=GROWING)
                lines.append(
                    f"mamba over the fastest transformer at batch {batch}: {ratio:.1f}x, "
                    f"{decode:.1f}x once the prompt is read"
                    + ("" if grown is None else f"; {grown:.1f}x over the growing cache")
                )
        fewer = [row for row in self.rows if 0 < row.tokens_timed < TOKENS]
        if fewer:
            counts = {row.batch: row.tokens_timed for row in fewer}
            text = ", ".join(f"{n} at batch {batch}" for batch, n in counts.items())
            lines.append(
                f"timed on fewer than {TOKENS} tokens ({text}); prompts of a larger batch counted "
                "as so many runs of a few"
            )
        if any(row.captured for row in self.rows):
            lines.append("decoding replays CUDA graphs, for both alike")
        return lines + self.noise()

    def _sizes(self) -> str:
        """Parameters of mamba and of the Transformers, which have the same weights."""
        shown = {name.partition(" ")[0].rstrip(","): n for name, n in self.parameters.items()}
        return ", ".join(f"{name} {n / 1e6:.1f} M" for name, n in shown.items())

    def plot(self) -> Figure:
        """Tokens a second, and state memory, against the batch."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        for i, name in enumerate(dict.fromkeys(row.model for row in self.rows)):
            rows = [row for row in self.rows if row.model == name and row.rate]
            style = {
                "color": COLOURS[(0, 3, 4, 5)[i % 4]],
                "marker": MARKERS[i],
                "linewidth": 2.2 if any(row.ours for row in rows) else 1.4,
            }
            batches = [row.batch for row in rows]
            left.plot(batches, [row.rate or 0.0 for row in rows], label=name, **style)
            memory = [(row.state_bytes or 0) / 2**20 for row in rows]
            right.plot(batches, memory, label=name, **style)
        if self.environment.get("device", "cpu") != "cpu":
            for (name, rates), dash in zip(PAPER_RATES.items(), ("-", "--")):
                left.plot(
                    list(rates),
                    list(rates.values()),
                    label=f"paper, A100: {name}",
                    color=PAPER,
                    linestyle=dash,
                    linewidth=1,
                )
        batches = sorted({row.batch for row in self.rows})
        for axes, title in ((left, "tokens/s, prompt included"), (right, "state (MB)")):
            axes.set(xscale="log", yscale="log", xlabel="batch", title=title)
            axes.set_xticks(batches, [str(b) for b in batches], minor=False)
            plain(axes)
        handles, names = left.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", frameon=False, ncols=3)
        figure.suptitle(
            f"Prompt {self.prompt}, {TOKENS} tokens, {self.dtype}, {self.machine()}: "
            f"{self._sizes()}",
            fontsize=11,
        )
        return figure


def bench_decode(
    *,
    batches: Sequence[int] = BATCHES,
    device: str = "cpu",
    threads: int | None = None,
    scale: Scale | None = None,
    prompt: int = PROMPT,
    progress: Callable[[str], None] = lambda line: None,
    so_far: Callable[[DecodeBench], object] = lambda found: None,
) -> DecodeBench:
    """Checks that decoding equals `forward`, then times both models at every batch size.

    On a CPU the models take turns, and large batches decode fewer tokens. `so_far` is given what
    was found, after every batch size. Raises GateClosed, before anything is timed, if decoding
    gives other logits than `forward`.
    """
    place = torch.device(device)
    if scale is None:
        scale = CUDA_SCALE if place.type == "cuda" else CPU_SCALE
    with conditions(place, threads) as facts, torch.no_grad():
        models = _models(scale, place)
        gate = {}
        for name, model in models.items():
            progress(f"checking {name}")
            gate[name] = _judge(name, model, scale)
        found = DecodeBench(
            parameters={name: model.num_parameters for name, model in models.items()},
            gate=gate,
            dtype=str(scale.dtype).removeprefix("torch."),
            prompt=prompt,
            rows=[],
            environment=facts,
        )
        for batch in batches:
            progress(f"timing batch {batch}")
            # On a GPU two caches would not fit beside each other.
            turns = [models] if place.type == "cpu" else [{n: m} for n, m in models.items()]
            for together in turns:
                found.rows.extend(_at_batch(together, batch, prompt, scale))
                free(place)
            so_far(found)
    return found


def _models(scale: Scale, device: torch.device) -> dict[str, Backbone]:
    """Mamba, and Transformers of nearly as many parameters, one for each way to attend."""

    def build(name: str, d_model: int, num_layers: int, **options: Any) -> Backbone:
        torch.manual_seed(0)
        with device:
            model = build_model(
                name,
                vocab_size=scale.vocab_size,
                d_model=d_model,
                num_layers=num_layers,
                **options,
            )
        for parameter in model.parameters():
            if not getattr(parameter, "_no_weight_decay", False):  # A, D and Δ bias stay float32
                parameter.data = parameter.data.to(scale.dtype)
        return model.eval()

    mamba = build("mamba", scale.d_model, scale.num_layers)
    layers = max(1, scale.num_layers // 2)
    width = match_parameters(
        "transformer",
        parameters=mamba.num_parameters,
        vocab_size=scale.vocab_size,
        num_layers=layers,
        num_heads=scale.num_heads,
        multiple_of=scale.multiple_of,
    )
    ways: dict[str, type[Attention]] = {"transformer": CachedAttention}
    if device.type == "cuda":
        ways = {"transformer (SDPA)": _CachedByMask, "transformer (products)": _CachedByProducts}
    ways[GROWING] = Attention
    return {
        "mamba": mamba,
        **{
            name: build("transformer", width, layers, num_heads=scale.num_heads, layer=way)
            for name, way in ways.items()
        },
    }


def _judge(name: str, model: Backbone, scale: Scale) -> float:
    """The largest difference between the logits of `forward` and of prompt and steps."""
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(scale.vocab_size, (2, 40), generator=generator).to(device)
    whole = model(tokens).float()
    first, state = model(tokens[:, :32], model.initial_state(2))
    found = [first.float()]
    for t in range(32, 40):
        logits, state = model.step(tokens[:, t], state)
        found.append(logits[:, None].float())
    distance = ((torch.cat(found, 1) - whole).abs().max() / whole.abs().max()).item()
    if not distance <= _TOLERANCE[scale.dtype]:
        raise GateClosed(
            f"bench decode: {name}: decoding is off by {distance:.1e} of the largest logit, beyond "
            f"{_TOLERANCE[scale.dtype]:.0e}; nothing is timed"
        )
    return distance


def _at_batch(models: dict[str, Backbone], batch: int, prompt: int, scale: Scale) -> list[Row]:
    sessions: dict[str, _Session] = {}
    failed: dict[str, str] = {}
    samples: dict[str, list[float]] = {}
    for name, model in models.items():
        try:
            sessions[name] = _Session(model, batch, prompt, scale)
            samples[name] = []
        except (RuntimeError, MemoryError) as error:
            failed[name] = reason(error)
    for _ in range(_ROUNDS):
        for name, session in sessions.items():
            samples[name].append(session.step_seconds())
    return [
        Row(
            model=name,
            ours=name == "mamba",
            batch=batch,
            prompt_seconds=sessions[name].prompt_seconds,
            step_seconds=statistics.median(samples[name]),
            tokens_timed=sessions[name].tokens_timed,
            state_bytes=sessions[name].state_bytes,
            captured=sessions[name].replay is not None,
        )
        if name in sessions
        else Row(model=name, ours=name == "mamba", batch=batch, not_run=failed[name])
        for name in models
    ]


class _Session:
    """A batch whose prompt has been read, ready to decode."""

    def __init__(self, model: Backbone, batch: int, prompt: int, scale: Scale) -> None:
        self.model = model
        self.device = model.embedding.weight.device
        cuda = self.device.type == "cuda"
        self.state = model.initial_state(batch)
        self.grows = any(x.numel() == 0 for x in leaves(self.state))
        self.tokens_B, self.prompt_seconds = self._read(batch, prompt, scale)
        self.state_bytes = sum(x.numel() * x.element_size() for x in leaves(self.state))
        # Where to start again from: a state that grows, else places in the sequence.
        self.start = self.state
        self.places = [x.clone() for x in self._places()]
        self.tokens_timed = TOKENS if cuda or batch <= 2 else 32 if batch <= 16 else 8
        self.replay: Callable[[], object] | None = None
        self._steps(2)
        if cuda and not self.grows:
            self.replay = capture(lambda: self._steps(_STEPS_A_GRAPH))

    def step_seconds(self) -> float:
        """Of one token of the whole batch, over a run of them."""
        self.state = self.start
        for x, start in zip(self._places(), self.places):
            x.copy_(start)
        self._wait()
        began = time.perf_counter()
        if self.replay is None:
            self._steps(self.tokens_timed)
        else:
            for _ in range(self.tokens_timed // _STEPS_A_GRAPH):
                self.replay()
        self._wait()
        return (time.perf_counter() - began) / self.tokens_timed

    def _places(self) -> list[Tensor]:
        return [x for x in leaves(self.state) if not x.is_floating_point()]

    def _read(self, batch: int, prompt: int, scale: Scale) -> tuple[Tensor, float]:
        """The first tokens of the answers, and the seconds that reading the prompts took.

        A few prompts at a time, as activations need memory. On a CPU a few are read, the others'
        states are copies, and the time is scaled up.
        """
        some = min(batch, scale.prompts_at_once)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(scale.vocab_size, (some, prompt), generator=generator)
        tokens = tokens.to(self.device)
        self.model(tokens[:, :32], self.model.initial_state(some))  # warms up
        answers: list[Tensor] = []
        taken: list[float] = []
        parts: list[list[Tensor]] = []
        for first in range(0, batch, some):
            if self.device.type == "cuda" or not taken:
                self._wait()
                began = time.perf_counter()
                logits, state = self.model(tokens, self.model.initial_state(some))
                self._wait()
                taken.append(time.perf_counter() - began)
                answer_B = logits[:, -1].argmax(-1)
                del logits
            count = min(some, batch - first)
            answers.append(answer_B[:count])
            read = [x[:count] for x in leaves(state)]
            if self.grows:
                parts.append(read)
            else:
                for into, x in zip(leaves(self.state), read):
                    into[first : first + count].copy_(x)
        if self.grows:
            self.state = with_leaves(state, (torch.cat(x) for x in zip(*parts)))
        return torch.cat(answers), statistics.mean(taken) * batch / some

    def _steps(self, count: int) -> None:
        """Greedy tokens; state and tokens stay in the same tensors, as a CUDA graph wants."""
        tokens_B, state = self.tokens_B, self.state
        for _ in range(count):
            logits_BV, state = self.model.step(tokens_B, state)
            tokens_B = logits_BV.argmax(-1)
        self.tokens_B.copy_(tokens_B)
        if self.grows:
            self.state = state
            return
        for into, x in zip(leaves(self.state), leaves(state)):
            if into is not x:
                into.copy_(x)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
