"""Greedy tokens in fp32 equal transformers' generate, however the work is cut: batches, chunks, layers, handoffs."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from layercast_agent.engine.attention import BatchPlan, Span

LENGTHS = (13, 1, 7, 30, 2, 18)
COUNT = 8


def test_the_judge_is_not_trivial(tiny: Any, families: ModuleType) -> None:
    """Otherwise equal tokens would prove nothing: the answers must depend on the whole prompt and not repeat."""
    one, other = families.prompts([20, 20])
    answer = tiny.expected(one, 2 * COUNT)
    assert len(set(answer)) > COUNT
    assert answer != tiny.expected(other, 2 * COUNT)
    # Further back than a window sees, near enough for the windows of all layers together.
    far = (one[-9] + 1) % families.VOCABULARY
    assert tiny.expected((*one[:-9], far, *one[-8:]), 2 * COUNT) != answer


def test_batch_of_mixed_lengths(tiny: Any, families: ModuleType) -> None:
    engine = tiny.engine()
    prompts = families.prompts(LENGTHS)
    for index, prompt in enumerate(prompts):
        engine.add(families.sequence(prompt, COUNT + index, name=f"r{index}", arrived_at=index))
    events = families.run(engine)
    for index, prompt in enumerate(prompts):
        assert families.tokens(events, f"r{index}") == tiny.expected(prompt, COUNT + index)
    assert engine.load().kv_pages_used == 0


@pytest.mark.parametrize("chunk", [1, 3, 5, 16])
def test_chunked_prefill(tiny: Any, families: ModuleType, chunk: int) -> None:
    prompt = families.prompts([30])[0]
    engine = tiny.engine(step_tokens_max=chunk)
    assert families.answer(engine, families.sequence(prompt, COUNT)) == tiny.expected(prompt, COUNT)


def test_logits(tiny: Any, families: ModuleType) -> None:
    """Not only which token is best: what logprobs and sampling see is right, too."""
    prompt = families.prompts([21])[0]
    expected = tiny.judge(torch.tensor([prompt])).logits[0].detach()
    kv = tiny.engine()._kv
    with torch.inference_mode():
        hidden = tiny.model.embed(torch.tensor(prompt))
        batch = BatchPlan.of(kv, [Span(start=0, count=21, pages=kv.allocator.allocate(6))])
        logits = tiny.model.logits(tiny.model.run_layers(0, tiny.layers, hidden, batch))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_scattered_pages(tiny: Any, families: ModuleType) -> None:
    """Pages that do not lie behind each other are gathered."""
    prompt = families.prompts([23])[0]
    engine = tiny.engine(pages=20, step_tokens_max=9)
    allocator = engine._kv.allocator
    single = [allocator.allocate(1) for _ in range(20)]
    for pages in single[1::2]:
        allocator.free(pages)
    seq = families.sequence(prompt, COUNT)
    engine.add(seq)
    events = engine.step()
    assert seq.pages == [1, 3, 5, 7, 9, 11]
    assert families.tokens(events + families.run(engine)) == tiny.expected(prompt, COUNT)


def test_every_split_of_a_handoff(tiny: Any, families: ModuleType) -> None:
    """k layers here, the rest there: for every k, beside a request that decodes there meanwhile."""
    prompt, company = families.prompts([23, 9])
    for k in range(tiny.layers + 1):
        giver, taker = tiny.engine(), tiny.engine(step_tokens_max=10)
        taker.add(families.sequence(company, COUNT + 4, name="company"))
        events = taker.step()
        given = families.sequence(prompt, COUNT)
        giver.add(given)
        giver.embed(given)
        for _ in range(k):
            giver.run_layer(given)
        state = bytes(giver.export_state(given).numpy())
        giver.release(given)
        assert giver.load().kv_pages_used == 0
        taken = families.sequence(prompt, COUNT)
        taker.add(taken)
        taker.import_state(taken, k, state)
        events += families.run(taker)
        assert families.tokens(events) == tiny.expected(prompt, COUNT), f"k={k}"
        assert families.tokens(events, "company") == tiny.expected(company, COUNT + 4)


@pytest.mark.parametrize("budget", [3, 9, 64])
def test_layers_gather_between_steps(tiny: Any, families: ModuleType, budget: int) -> None:
    """Waiting requests of different k join running ones, in one step and in small chunks."""
    prompts = families.prompts([11, 17, 5, 26, 8])
    engine = tiny.engine(step_tokens_max=budget, batch_size_max=3)
    for index, prompt in enumerate(prompts):
        engine.add(families.sequence(prompt, COUNT, name=f"r{index}", arrived_at=index))
    events = engine.step()
    gathered = set()
    for _ in range(3 * tiny.layers):
        for seq in engine.waiting[::2]:
            if seq.layers_done < tiny.layers:
                engine.run_layer(seq)
                gathered.add(seq.layers_done)
        events += engine.step()
    assert gathered == set(range(1, tiny.layers + 1))
    events += families.run(engine)
    for index, prompt in enumerate(prompts):
        assert families.tokens(events, f"r{index}") == tiny.expected(prompt, COUNT)


def test_layers_of_several_requests_in_one_go(tiny: Any, families: ModuleType) -> None:
    """Requests of different lengths through each layer together; one of them goes on elsewhere, the others here."""
    prompts = families.prompts([11, 3, 26])
    giver, taker = tiny.engine(), tiny.engine(step_tokens_max=10)
    seqs = [
        families.sequence(prompt, COUNT, name=f"r{at}", arrived_at=at) for at, prompt in enumerate(prompts)
    ]
    for seq in seqs:
        giver.add(seq)
    giver.run_layer(*seqs[:2])
    with pytest.raises(ValueError, match="no layer to run"):
        giver.run_layer(*seqs)
    giver.run_layer(seqs[2])
    giver.run_layer(*seqs)
    given = seqs[1]
    state = bytes(giver.export_state(given).numpy())
    giver.release(given)
    taken = families.sequence(prompts[1], COUNT, name="r1")
    taker.add(taken)
    taker.import_state(taken, 2, state)
    events = families.run(giver) + families.run(taker)
    for at, prompt in enumerate(prompts):
        assert families.tokens(events, f"r{at}") == tiny.expected(prompt, COUNT)


def test_replay_continues_greedily(tiny: Any, families: ModuleType) -> None:
    prompt = families.prompts([12])[0]
    whole = tiny.expected(prompt, COUNT)
    for have in range(COUNT):
        seq = families.sequence(prompt, COUNT, generated=whole[:have])
        engine = tiny.engine(step_tokens_max=5)
        assert families.answer(engine, seq) == whole[have:]
        assert seq.generated == whole


def test_preemptions_and_shared_prefixes(tiny: Any, families: ModuleType) -> None:
    """Too few pages for all, and beginnings in common: some lose their KV, some find it, all get their tokens."""
    common, *endings = families.prompts([13, 3, 8, 1, 5, 13])
    prompts = [(*common, *ending) for ending in endings[:-1]] + [endings[-1]]
    engine = tiny.engine(pages=13, step_tokens_max=21)
    for index, prompt in enumerate(prompts):
        engine.add(families.sequence(prompt, COUNT, name=f"r{index}", arrived_at=index))
    events = families.run(engine)
    for index, prompt in enumerate(prompts):
        assert families.tokens(events, f"r{index}") == tiny.expected(prompt, COUNT)
    load = engine.load()
    assert load.preemptions > 0 and load.prefix_tokens_hit >= 12
    assert (load.kv_pages_used, load.prefix_tokens_asked > load.prefix_tokens_hit) == (0, True)


def test_only_pages_with_all_layers_are_shared(llama: Any, families: ModuleType) -> None:
    """While layers run one by one a prefix is nobody else's; once the request has run through, it is."""
    prompt = families.prompts([17])[0]
    engine = llama.engine()
    first = families.sequence(prompt, COUNT, name="r0")
    engine.add(first)
    engine.run_layer(first)
    second = families.sequence(prompt, COUNT, name="r1", arrived_at=1)
    engine.add(second)
    engine.run_layer(second)
    assert not set(first.pages) & set(second.pages)
    events = families.run(engine)
    assert engine.load().prefix_tokens_hit == 0
    engine.add(families.sequence(prompt, COUNT, name="r2", arrived_at=2))
    events += families.run(engine)
    assert engine.load().prefix_tokens_hit == 16
    for index in range(3):
        assert families.tokens(events, f"r{index}") == llama.expected(prompt, COUNT)
