"""What an engine does besides computing tokens: ends, limits, cancellation, replay of samples, states that move."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layercast_agent.engine.engine import EngineLoad
from layercast_agent.engine.sampler import Draw, sample
from layercast_agent.engine.sequence import FinishReason
from layercast_agent.errors import NoCapacityError, PeerError, RequestError, RequestTooLongError

SAMPLING = {"temperature": 0.9, "top_p": 0.95, "top_k": 40, "seed": 11}


def test_a_stop_token_ends_and_is_sent(llama: Any, families: ModuleType) -> None:
    prompt = families.prompts([9])[0]
    whole = llama.expected(prompt, 8)
    stop = whole[3]
    engine = llama.engine()
    engine.add(families.sequence(prompt, 8, stop_token_ids=frozenset({stop, 5000})))
    events = families.run(engine)
    assert families.tokens(events) == whole[: whole.index(stop) + 1]
    assert [event.finish for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1].finish is FinishReason.STOP
    assert engine.load().kv_pages_used == 0


def test_max_tokens_counts_replayed_ones(llama: Any, families: ModuleType) -> None:
    prompt = families.prompts([9])[0]
    whole = llama.expected(prompt, 6)
    engine = llama.engine()
    engine.add(families.sequence(prompt, 6, generated=whole[:4]))
    events = families.run(engine)
    assert [(event.position, event.token_id) for event in events] == [(4, whole[4]), (5, whole[5])]
    assert events[-1].finish is FinishReason.LENGTH


def test_the_context_ends(llama: Any, families: ModuleType) -> None:
    prompt = families.prompts([9])[0]
    engine = llama.engine(context_length_max=12)
    engine.add(families.sequence(prompt, 50))
    events = families.run(engine)
    assert families.tokens(events) == llama.expected(prompt, 3)
    assert events[-1].finish is FinishReason.LENGTH


def test_a_replay_that_lost_only_its_end(llama: Any, families: ModuleType) -> None:
    """All tokens are there, the last event was lost: the end is told again, nothing is computed."""
    prompt = families.prompts([9])[0]
    whole = llama.expected(prompt, 4)
    engine = llama.engine()
    engine.add(families.sequence(prompt, 4, generated=whole, name="long enough"))
    engine.add(
        families.sequence(prompt, 9, generated=whole, name="stopped", stop_token_ids=frozenset(whole[3:]))
    )
    events = engine.step()
    assert [(event.position, event.token_id) for event in events] == [(3, whole[3])] * 2
    assert [event.finish for event in events] == [FinishReason.LENGTH, FinishReason.STOP]
    assert engine.load() == EngineLoad(
        requests_waiting=0, requests_running=0, prompt_tokens_waiting=0, kv_pages_used=0, kv_pages_total=64
    )


def test_samples_survive_replays_and_handoffs(tiny: Any, families: ModuleType) -> None:
    """Alone, in company, replayed after any number of tokens, handed over at any layer: the same tokens."""
    prompt, company = families.prompts([14, 5])
    whole = families.answer(tiny.engine(), families.sequence(prompt, 10, **SAMPLING))
    assert whole != tiny.expected(prompt, 10)
    other = families.answer(tiny.engine(), families.sequence(prompt, 10, **SAMPLING | {"seed": 12}))
    assert whole != other
    for have in range(0, 10, 3):
        k = have % (tiny.layers + 1)
        giver, taker = tiny.engine(), tiny.engine(step_tokens_max=4)
        taker.add(families.sequence(company, 12, name="company", temperature=1.3, seed=3))
        taker.step()
        given_away = families.sequence(prompt, 10, generated=whole[:have], **SAMPLING)
        giver.add(given_away)
        giver.embed(given_away)
        for _ in range(k):
            giver.run_layer(given_away)
        taken = families.sequence(prompt, 10, generated=whole[:have], **SAMPLING)
        taker.add(taken)
        taker.import_state(taken, k, bytes(giver.export_state(given_away).numpy()))
        assert families.tokens(families.run(taker)) == whole[have:]


def test_logprobs_travel_with_tokens(llama: Any, families: ModuleType) -> None:
    prompt = families.prompts([9])[0]
    engine = llama.engine()
    engine.add(families.sequence(prompt, 3, logprobs=True, top_logprobs=2))
    scores = llama.judge(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    first = families.run(engine)[0]
    assert first.logprobs.logprob == pytest.approx(scores.max().item(), abs=1e-4)
    assert [token for token, _ in first.logprobs.top] == scores.topk(2).indices.tolist()


def test_randomness_counts_generated_tokens(llama: Any, families: ModuleType) -> None:
    """The third token is drawn with position 2, however long the prompt is."""
    prompt = families.prompts([9])[0]
    sampled = families.answer(llama.engine(), families.sequence(prompt, 3, **SAMPLING))
    with torch.inference_mode():
        logits = llama.judge(torch.tensor([[*prompt, *sampled[:2]]])).logits[:, -1]
    draw = Draw(sampling=families.sequence(prompt, 3, **SAMPLING).sampling, position=2)
    assert sample(logits, [draw])[0].token_id == sampled[2]


def test_cancelling_frees_pages(llama: Any, families: ModuleType) -> None:
    engine = llama.engine(step_tokens_max=6, batch_size_max=2)
    for index, prompt in enumerate(families.prompts([4, 20, 9, 9])):
        engine.add(families.sequence(prompt, 6, name=f"r{index}", arrived_at=index))
    engine.step()
    engine.run_layer(engine.waiting[0])
    used = engine.load().kv_pages_used
    for name in ("r0", "r1", "r2", "r3"):  # decoding, in the middle of its prompt, with a layer done, fresh
        cancelled = engine.cancel(name)
        assert cancelled.request_id == name
        assert (cancelled.pages, cancelled.computed, cancelled.layers_done, cancelled.hidden) == (
            [],
            0,
            0,
            None,
        )
        assert engine.load().kv_pages_used <= used
        used = engine.load().kv_pages_used
    assert used == 0
    assert engine.cancel("r0") is None
    assert engine.step() == []


def test_a_released_request_can_come_back(llama: Any, families: ModuleType) -> None:
    """A handoff that nobody took: exported, released, added and imported again in the same engine."""
    prompt = families.prompts([11])[0]
    engine = llama.engine()
    seq = families.sequence(prompt, 5)
    engine.add(seq)
    engine.run_layer(seq)
    state = engine.export_state(seq)
    engine.release(seq)
    engine.release(seq)
    assert engine.waiting == ()
    engine.add(seq)
    engine.import_state(seq, 1, memoryview(state.numpy()))
    assert families.tokens(families.run(engine)) == llama.expected(prompt, 5)


def test_an_exported_state_is_nobody_elses(llama: Any, families: ModuleType) -> None:
    """And it has the layout of peer.proto: hidden states, then K, V of each layer."""
    prompt = families.prompts([11])[0]
    engine = llama.engine()
    seq = families.sequence(prompt, 5)
    engine.add(seq)
    engine.run_layer(seq)
    engine.run_layer(seq)
    state = engine.export_state(seq)
    copy = state.clone()
    shape = llama.model.shape
    floats = state.view(torch.float32)
    hidden = floats[: 11 * shape.hidden_size].view(11, shape.hidden_size)
    assert torch.equal(hidden, seq.hidden)
    kv = floats[11 * shape.hidden_size :].view(2, 2, 11, shape.kv_heads, shape.head_dim)
    first = seq.pages[0]
    for layer in range(2):
        assert torch.equal(kv[layer, 0, :4], engine._kv.key(layer)[first])
        assert torch.equal(kv[layer, 1, :4], engine._kv.value(layer)[first])
    families.run(engine)
    assert torch.equal(state, copy)


def test_bad_states_are_refused(llama: Any, families: ModuleType) -> None:
    prompt = families.prompts([11])[0]
    giver, taker = llama.engine(), llama.engine(pages=8)
    seq = families.sequence(prompt, 5)
    giver.add(seq)
    with pytest.raises(ValueError, match="layer boundary"):
        giver.export_state(seq)
    giver.run_layer(seq)
    state = bytes(giver.export_state(seq).numpy())
    taken = families.sequence(prompt, 5)
    taker.add(taken)
    for layers_done, data in ((2, state), (1, state[:-1]), (llama.layers + 1, state), (-1, state)):
        with pytest.raises(PeerError, match="the state of request r has"):
            taker.import_state(taken, layers_done, data)
    assert taker.load().kv_pages_used == 0
    full = families.sequence([1] * 24, 5, name="full")
    taker.add(full)
    taker.run_layer(full)
    with pytest.raises(NoCapacityError):
        taker.import_state(taken, 1, state)
    assert (taken.hidden, taken.layers_done, taken.pages) == (None, 0, [])
    with pytest.raises(ValueError, match="does not wait"):
        taker.import_state(families.sequence(prompt, 5, name="stranger"), 1, state)


def test_a_quantum_is_one_layer(llama: Any, families: ModuleType) -> None:
    engine = llama.engine()
    seq = families.sequence(families.prompts([11])[0], 5)
    with pytest.raises(ValueError, match="no layer to run"):
        engine.run_layer(seq)
    engine.add(seq)
    for k in range(1, llama.layers + 1):
        engine.run_layer(seq)
        assert seq.layers_done == k
        assert engine.prefill_tokens_done == 11 * k // llama.layers
        assert (engine.running, engine.prefilling) == ((), 0)
    with pytest.raises(ValueError, match="no layer to run"):
        engine.run_layer(seq)
    assert len(engine.step()) == 1
    assert engine.prefill_tokens_done == 11


def test_refusals(llama: Any, families: ModuleType) -> None:
    engine = llama.engine(waiting_max=1)
    with pytest.raises(RequestError, match="token 199 is outside the vocabulary of 199"):
        engine.add(families.sequence([1, 199], 5))
    with pytest.raises(RequestTooLongError):
        engine.check(families.sequence([1] * 128, 5))
    engine.add(families.sequence([1, 2], 5, name="a"))
    with pytest.raises(NoCapacityError, match="1 requests wait"):
        engine.add(families.sequence([1, 2], 5, name="b"))
    assert engine.waiting[0].request_id == "a"


def test_load(llama: Any, families: ModuleType) -> None:
    engine = llama.engine(step_tokens_max=6)
    engine.add(families.sequence([1] * 10, 5, name="a"))
    engine.step()
    assert engine.prefilling == 1
    engine.add(families.sequence([1] * 7, 5, name="b", generated=[1]))
    load = engine.load()
    assert (load.requests_waiting, load.requests_running, load.prompt_tokens_waiting) == (1, 1, 8)
    assert (load.kv_pages_used, load.kv_pages_total) == (3, 64)


@settings(max_examples=25)
@given(data=st.data())
def test_any_order_of_moves(data: st.DataObject, families: ModuleType) -> None:
    """Arrivals, quanta, steps, cancellations and handoffs between two engines, in any order: greedy tokens as one
    engine alone would give them, no page left behind."""
    tiny = TINY[data.draw(st.sampled_from(["llama", "gemma2"]), label="family")]
    budget = data.draw(st.integers(1, 30), label="budget")
    engines = [tiny.engine(step_tokens_max=budget, pages=20), tiny.engine(batch_size_max=2, pages=16)]
    prompts = families.prompts([3, 19, 8, 12, 1], seed=9)
    expected = {f"r{i}": tiny.expected(prompt, 4) for i, prompt in enumerate(prompts)}
    events: list[Any] = []
    moves = data.draw(
        st.lists(st.tuples(st.sampled_from(MOVES), st.integers(0, 1)), max_size=40), label="moves"
    )
    coming = [families.sequence(p, 4, name=f"r{i}", arrived_at=i) for i, p in enumerate(prompts)]
    for move, place in moves:
        engine, other = engines[place], engines[1 - place]
        ready = [s for s in engine.waiting if s.layers_done < tiny.layers and (s.pages or engine.has_room(s))]
        if move == "add" and coming:
            engine.add(coming.pop(0))
        elif move == "step":
            events += engine.step()
        elif move == "layer" and ready:
            engine.run_layer(ready[0])
        elif move == "handoff" and engine.waiting:
            hand_over(engine.waiting[-1], engine, other)
        elif move == "restart" and engine.running:
            seq = engine.cancel(engine.running[0].request_id)
            other.add(seq)
    for seq in coming:
        engines[0].add(seq)
    for engine in engines:
        events += families.run(engine)
        assert engine.load().kv_pages_used == 0
    events.sort(key=lambda event: event.position)
    assert {name: families.tokens(events, name) for name in expected} == expected


MOVES = ["add", "step", "step", "layer", "layer", "handoff", "restart"]
TINY: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def _models(llama: Any, gemma: Any) -> None:
    TINY.update(llama=llama, gemma2=gemma)


def hand_over(seq: Any, giver: Any, taker: Any) -> None:
    """What two replicas do with a request, bytes and all; it stays when the taker has no pages."""
    giver.embed(seq)
    k, state = seq.layers_done, bytes(giver.export_state(seq).numpy())
    giver.release(seq)
    taker.add(seq)
    try:
        taker.import_state(seq, k, state)
    except NoCapacityError:
        taker.release(seq)
        giver.add(seq)
