"""From a checked API request to work in the dispatcher: tokenising, limits, seeds, one unit of work per choice."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from layercast.engine.v1alpha1 import engine_pb2

from layercast_gateway import answers
from layercast_gateway.dispatcher import Dispatcher
from layercast_gateway.errors import ClientError, ContextLengthError
from layercast_gateway.generation import PACE_S, Choice, Pieces, pieces_max
from layercast_gateway.openai import ApiKind, GenerationRequest
from layercast_gateway.replay import Work
from layercast_gateway.settings import Settings
from layercast_gateway.texts import Texts
from layercast_gateway.tokenizer import ModelText

THREAD_CHARACTERS = 16_384
"""Longer texts are tokenised in a thread: tokens of others flow meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One API request under way: its choices and what they have to say."""

    dispatcher: Dispatcher
    request_ids: tuple[str, ...]
    choices: tuple[Choice, ...]
    echoes: tuple[str, ...]
    """Of each choice: the prompt's text when it was asked for, else empty."""
    prompt_tokens: int
    pieces: Pieces

    def usage(self) -> answers.Json:
        """Token counts up to now."""
        completion_tokens = sum(choice.token_count for choice in self.choices)
        return answers.usage_body(prompt_tokens=self.prompt_tokens, completion_tokens=completion_tokens)

    def abandon(self) -> None:
        """Ends what still runs."""
        for request_id in self.request_ids:
            self.dispatcher.abandon(request_id)


async def begin(
    wanted: GenerationRequest, *, settings: Settings, dispatcher: Dispatcher, texts: Texts
) -> Job:
    """Hands a request to the dispatcher, one unit of work per choice; raises the error that is its answer.

    May wait for the model's tokenizer; the places in the queue are kept meanwhile, and counted as demand.
    """
    accepted_at, arrived_at = time.monotonic(), time.time()
    deadline = accepted_at + settings.request_deadline_s
    places = wanted.choices * max(1, len(wanted.prompts))
    with dispatcher.admit(wanted.model, places) as admission:
        text = await texts.get(wanted.model, accepted_at=accepted_at, deadline=deadline)
        prompts = await _encode(wanted, text)
        context = dispatcher.route(wanted.model).context_length_max or text.context_length_max
        limits = [_max_tokens(wanted, prompt, context) for prompt in prompts]
        most = sum(pieces_max(choices=wanted.choices, max_tokens=limit) for limit in limits)
        pieces = Pieces(most, wake_early=wanted.stream, pace_s=PACE_S if wanted.stream else 0.0)
        _check_ids(wanted, text)
        seed = secrets.randbits(63) if wanted.sampling.seed is None else wanted.sampling.seed
        choices, request_ids, echoes = [], [], []
        for index in range(places):
            prompt, limit = prompts[index // wanted.choices], limits[index // wanted.choices]
            work = Work(
                request_id=secrets.token_hex(16),
                model=wanted.model,
                prompt=prompt,
                sampling=_sampling(wanted, text, limit=limit, seed=choice_seed(seed, index)),
                arrived_at=arrived_at,
                deadline=deadline,
            )
            choice = Choice(
                index=index,
                text=text,
                prompt=prompt,
                continues_prompt=wanted.kind is ApiKind.COMPLETION,
                stops=wanted.stops,
                stop_token_ids=wanted.sampling.stop_token_ids,
                min_tokens=wanted.sampling.min_tokens,
                pieces=pieces,
            )
            dispatcher.submit(work, choice, admission=admission, accepted_at=accepted_at)
            choices.append(choice)
            request_ids.append(work.request_id)
            echoes.append(_echo(wanted, text, prompt, index // wanted.choices))
    return Job(
        dispatcher=dispatcher,
        request_ids=tuple(request_ids),
        choices=tuple(choices),
        echoes=tuple(echoes),
        prompt_tokens=sum(len(prompt) for prompt in prompts),
        pieces=pieces,
    )


def choice_seed(seed: int, index: int) -> int:
    """The seed of a choice, 64 bits unsigned: the given one for the first, independent ones for the others."""
    if index == 0:
        return seed % 2**64
    digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


async def _encode(wanted: GenerationRequest, text: ModelText) -> list[tuple[int, ...]]:
    characters = sum(len(message["content"]) for message in wanted.messages) + sum(map(len, wanted.prompts))
    if characters > THREAD_CHARACTERS:
        return await asyncio.to_thread(_encode_now, wanted, text)
    return _encode_now(wanted, text)


def _encode_now(wanted: GenerationRequest, text: ModelText) -> list[tuple[int, ...]]:
    if wanted.kind is ApiKind.CHAT:
        prompts = [text.encode_chat(wanted.messages)]
    else:
        prompts = [text.encode(prompt) if isinstance(prompt, str) else prompt for prompt in wanted.prompts]
    param = "messages" if wanted.kind is ApiKind.CHAT else "prompt"
    for prompt in prompts:
        if not prompt:
            raise ClientError("The prompt has no token.", param=param, code="empty_prompt")
        if (largest := max(prompt)) >= text.vocabulary_size:
            message = f"Token id {largest} is outside the vocabulary of {text.vocabulary_size} tokens."
            raise ClientError(message, param=param, code="invalid_token_id")
    return prompts


def _max_tokens(wanted: GenerationRequest, prompt: Sequence[int], context: int) -> int:
    """How many tokens the answer may have; ContextLengthError when prompt and answer do not fit."""
    asked = wanted.max_tokens
    param = "messages" if wanted.kind is ApiKind.CHAT else "prompt"
    room = context - len(prompt)
    if room < max(1, asked or 1):
        detail = f"{len(prompt)} in the {param}" + (f", {asked} in the completion" if asked else "")
        total = len(prompt) + (asked or 0)
        raise ContextLengthError(
            f"This model's maximum context length is {context} tokens. However, you requested {total} tokens "
            f"({detail}). Please reduce the length of the {param} or completion.",
            param=param,
        )
    return asked if asked is not None else room


def _sampling(wanted: GenerationRequest, text: ModelText, *, limit: int, seed: int) -> engine_pb2.Sampling:
    sampling = wanted.sampling
    ends = () if sampling.ignore_eos else text.stop_token_ids
    guide = sampling.guide
    return engine_pb2.Sampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=seed,
        max_tokens=limit,
        stop_token_ids=sorted({*ends, *sampling.stop_token_ids}),
        top_logprobs=wanted.top_logprobs,
        logprobs=wanted.logprobs,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
        min_tokens=sampling.min_tokens,
        guide=engine_pb2.Guide(**{guide.kind: guide.text}) if guide is not None else None,
    )


def _check_ids(wanted: GenerationRequest, text: ModelText) -> None:
    for token_id, _ in wanted.sampling.logit_bias:
        if token_id >= text.vocabulary_size:
            message = (
                f"`logit_bias` names token {token_id}; the vocabulary has {text.vocabulary_size} tokens."
            )
            raise ClientError(message, param="logit_bias", code="invalid_token_id")


def _echo(wanted: GenerationRequest, text: ModelText, prompt: Sequence[int], index: int) -> str:
    if not wanted.echo:
        return ""
    original = wanted.prompts[index]
    return original if isinstance(original, str) else text.decode(prompt)
