"""The state of one request on this worker, and what its tokens look like on the way out.

No torch at import: whoever schedules or moves requests handles sequences without it.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from layercast_agent.engine.guidance import GuideState


class FinishReason(Enum):
    """Why a request ended well."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class Guide:
    """What an output must look like: `kind` "json_schema", "regex", "grammar" or "choice", and its text."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen; engine.proto's Sampling with its defaults filled in.

    `temperature` 0 is greedy. `top_p` in (0, 1]; `top_k` 0 means all tokens. `seed` is an unsigned 64-bit number.
    `max_tokens` and `min_tokens` count every generated token, replayed ones included.

    `min_p` in [0, 1]; `repetition_penalty` above 0, 1 for none; `logit_bias` pairs of token id and what is added.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    logprobs: bool = False
    top_logprobs: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    guide: Guide | None = None

    @property
    def shaped(self) -> bool:
        """Whether logits change before a token is chosen, beside what chance does."""
        return (
            self.guide is not None
            or self.repetition_penalty != 1
            or bool(self.presence_penalty or self.frequency_penalty or self.logit_bias or self.min_tokens)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Natural-log probabilities at one position, of the distribution at temperature 1 over the whole vocabulary.

    `logprob` is the chosen token's; `top` holds (token id, logprob), best first, ties by id.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """One token of one request. `position` is its index among all generated tokens, replayed ones included.

    `error` is set where the request cannot go on after this token, in words for its client.
    """

    request_id: str
    attempt: int
    gateway_id: str
    position: int
    token_id: int
    logprobs: TokenLogprobs | None = None
    finish: FinishReason | None = None
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePlace:
    """The replica at which a request goes on once its prompt is computed; `address` is its host:port."""

    replica_id: str
    address: str


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """One request. Its prefix is the prompt and all tokens generated so far, here or by an earlier attempt.

    `arrived_at`, seconds since the epoch, is when the gateway accepted it, and the order of service everywhere.

    While it waits it may gather layers one by one: `hidden` [prefix, hidden size] is the state of all prefix tokens
    after `layers_done` layers (0: the embeddings), and its pages hold the KV of the layers below. Once it runs,
    `computed` counts the positions whose KV is complete in all layers. Two sequences are never equal.

    `page_keys` name the contents of its full pages, computed when first wanted; the first `pages_shareable` pages are
    known to others by them. `guide_state` follows from the guide and the generated tokens; None until it is wanted.
    `decode_at` is where it wants to go on after its prompt; None: here.
    """

    request_id: str
    attempt: int
    gateway_id: str
    prompt: tuple[int, ...]
    generated: list[int]
    sampling: SamplingParams
    arrived_at: float
    layers_done: int = 0
    hidden: torch.Tensor | None = None
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    pages_shareable: int = 0
    page_keys: list[bytes] = field(default_factory=list)
    guide_state: GuideState | None = None
    decode_at: DecodePlace | None = None

    @property
    def order(self) -> tuple[float, str]:
        """First come, first served; the id decides between equals."""
        return (self.arrived_at, self.request_id)

    @property
    def prefix_length(self) -> int:
        """Tokens known so far."""
        return len(self.prompt) + len(self.generated)

    @property
    def remaining(self) -> int:
        """Prefix positions that are not computed in all layers yet; 1 while decoding."""
        return self.prefix_length - self.computed

    @property
    def prefilling(self) -> bool:
        """More than the step for its next token is missing."""
        return self.remaining > 1 or self.hidden is not None

    def tokens(self, start: int, stop: int) -> Ordered[int]:
        """Token ids at prefix positions [start, stop)."""
        split = len(self.prompt)
        return (
            *self.prompt[start:stop],
            *self.generated[max(0, start - split) : max(0, stop - split)],
        )

    def reset(self) -> None:
        """Forgets everything that was executed; the tokens stay. The pages must have been freed."""
        self.layers_done = 0
        self.hidden = None
        self.computed = 0
        self.pages = []
        self.pages_shareable = 0

    def finish(self, context_length_max: int) -> FinishReason | None:
        """Why no token follows the last one; None while one does. The stop token itself is part of the output."""
        if self.generated and self.generated[-1] in self.sampling.stop_token_ids:
            return FinishReason.STOP
        if len(self.generated) >= self.sampling.max_tokens or self.prefix_length >= context_length_max:
            return FinishReason.LENGTH
        return None
