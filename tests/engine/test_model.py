"""Building, attaching and refusing models; what a checkpoint looks like to them."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from layercast_agent.engine import native
from layercast_agent.engine.attention import BatchPlan, Span
from layercast_agent.engine.generic import GenericModel
from layercast_agent.engine.kv import KVCache
from layercast_agent.engine.model import Wanted, build_model, choose_block, shape_of
from layercast_agent.errors import AgentError, CheckpointError, UnsupportedArchitectureError

CPU = torch.device("cpu")
SMOLLM2_SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def test_shape() -> None:
    shape = shape_of(SMOLLM2_SHAPE, "BF16")
    assert (shape.layers, shape.hidden_size, shape.kv_heads, shape.head_dim) == (30, 576, 3, 64)
    assert (shape.vocab_size, shape.context_length_max, shape.dtype, shape.tied) == (
        49152,
        8192,
        torch.bfloat16,
        True,
    )
    assert shape_of(SMOLLM2_SHAPE, "bfloat16") == shape


@pytest.mark.parametrize("wanted", [Wanted.GENERIC, Wanted.FAST])
def test_building_is_quick_and_without_parameters(wanted: Wanted) -> None:
    shape = shape_of(SMOLLM2_SHAPE, "float32")
    seconds = []
    for _ in range(3):
        started = time.thread_time()
        model = build_model(config=SMOLLM2_SHAPE, shape=shape, device=CPU, wanted=wanted)
        seconds.append(time.thread_time() - started)
    assert all(parameter.is_meta for _, parameter in model.named_tensors())
    assert min(seconds) < 1.0


def test_names_and_buffers(tiny: Any, families: ModuleType) -> None:
    names = [name for name, _ in tiny.model.named_tensors()]
    assert len(names) == len(set(names))
    assert ("lm_head.weight" in names) == (not tiny.model.shape.tied)
    assert names == list(families.parameters(tiny.judge, tiny.model))
    if not isinstance(tiny.model, GenericModel):
        return
    buffers = dict(tiny.model._causal_lm.named_buffers())
    reference = dict(tiny.judge.named_buffers())
    assert buffers.keys() == reference.keys()
    for name, buffer in buffers.items():
        assert torch.equal(buffer, reference[name]), name


def test_attaching_copies_nothing(either_llama: Any, families: ModuleType) -> None:
    """Parameters live in the given memory, in whatever order segments come; execution starts with the first."""
    llama = either_llama
    tensors = families.parameters(llama.judge, llama.model)
    memory = families.packed(tensors)
    model = build_model(config=llama.config, shape=llama.model.shape, device=CPU, wanted=llama.wanted)
    kv = KVCache(model.shape, 4, device=CPU)
    batch = BatchPlan.of(kv, [Span(start=0, count=3, pages=kv.allocator.allocate(1))])
    hidden = torch.randn(3, model.shape.hidden_size)
    with pytest.raises(AgentError, match=r"model\.layers\.1"):
        model.run_layers(1, 2, hidden, batch)
    model.attach({name: tensor for name, tensor in memory.items() if ".layers.1." in name})
    for name, parameter in model.named_tensors():
        assert parameter.is_meta != (".layers.1." in name)
    for name in ("self_attn.k_proj", "mlp.up_proj"):
        before = model.run_layers(1, 2, hidden, batch)
        memory[f"model.layers.1.{name}.weight"].zero_()
        assert not torch.equal(model.run_layers(1, 2, hidden, batch), before), name
    with pytest.raises(AgentError, match="segment 0"):
        model.embed(torch.tensor([1]))
    with pytest.raises(AgentError, match=f"segment {model.shape.layers + 1}"):
        model.logits(hidden)


def test_a_tied_head_reads_the_embedding(gemma: Any) -> None:
    model = gemma.model
    assert model._head.weight.data_ptr() == model._embed.weight.data_ptr()


def test_wrong_tensors_are_named(either_llama: Any, gemma: Any) -> None:
    llama = either_llama
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(CheckpointError, match="q_proj") as caught:
        llama.model.attach({name: torch.zeros(3, 3)})
    assert caught.value.tensor == name
    with pytest.raises(CheckpointError, match="float32"):
        llama.model.attach({name: torch.zeros(32, 32, dtype=torch.bfloat16)})
    for unknown in (
        "model.layers.0.self_attn.x_proj.weight",
        "model.layers.0.nothing.weight",
        "model.layers",
    ):
        with pytest.raises(CheckpointError, match="no such parameter"):
            llama.model.attach({unknown: torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"no such parameter .*lm_head"):
        gemma.model.attach({"lm_head.weight": torch.zeros(families_shape(gemma))})


def families_shape(tiny: Any) -> tuple[int, int]:
    return (tiny.model.shape.vocab_size, tiny.model.shape.hidden_size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["FalconForCausalLM"], "model_type": "falcon"}, "FalconForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "nothing"}, "model_type nothing"),
        ({"architectures": None, "model_type": None}, "unnamed"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized by gptq"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=message):
        shape_of({**SMOLLM2_SHAPE, **changes}, "float32")


def test_malformed_configs_are_refused() -> None:
    with pytest.raises(CheckpointError, match="int8"):
        shape_of(SMOLLM2_SHAPE, "int8")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        shape_of({**SMOLLM2_SHAPE, "num_hidden_layers": "many"}, "float32")


def test_a_model_without_named_architecture_is_known_by_its_type() -> None:
    assert shape_of({**SMOLLM2_SHAPE, "architectures": None}, "float32").layers == 30


def test_bfloat16_runs(either_llama: Any, families: ModuleType) -> None:
    """Close to fp32, and handoffs move bf16 bytes; equal tokens are promised for fp32 only."""
    llama = either_llama
    model = families.attached(llama.config, llama.judge, "bfloat16", llama.block)
    shape = model.shape
    tiny = families.Tiny(config=llama.config, judge=llama.judge, model=model)
    prompt = families.prompts([9])[0]
    giver, taker = tiny.engine(), tiny.engine()
    seq = families.sequence(prompt, 3, logprobs=True)
    giver.add(seq)
    giver.run_layer(seq)
    state = bytes(giver.export_state(seq).numpy())
    assert len(state) == 9 * (shape.hidden_size + 2 * shape.kv_heads * shape.head_dim) * 2
    giver.release(seq)
    taker.add(seq)
    taker.import_state(seq, 1, state)
    first = families.run(taker)[0]
    scores = llama.judge(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    assert first.logprobs.logprob == pytest.approx(scores[first.token_id].item(), abs=0.2)


def test_engines_on_two_threads_do_not_mix(llama: Any, gemma: Any, families: ModuleType) -> None:
    """The batch travels beside the call; each thread must see its own."""
    prompt = families.prompts([13])[0]
    expected = [tiny.expected(prompt, 8) for tiny in (llama, gemma)]
    found: list[list[int]] = [[], []]

    def serve(place: int, tiny: Any) -> None:
        for _ in range(5):
            found[place] = families.answer(tiny.engine(step_tokens_max=4), families.sequence(prompt, 8))

    threads = [threading.Thread(target=serve, args=pair) for pair in enumerate((llama, gemma))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_the_fast_block_is_chosen_where_it_can_be() -> None:
    assert choose_block(SMOLLM2_SHAPE).fast
    assert not choose_block(SMOLLM2_SHAPE, Wanted.GENERIC).fast
    for changes, reason in (
        ({"hidden_act": "gelu"}, "gelu"),
        ({"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"}, "olmo2"),
    ):
        config = {**SMOLLM2_SHAPE, **changes}
        choice = choose_block(config)
        assert not choice.fast
        assert reason in choice.reason
        with pytest.raises(UnsupportedArchitectureError, match=reason):
            choose_block(config, Wanted.FAST)


def test_the_fast_block_is_native_here(fast: Any) -> None:
    """CI has a compiler: the C++ layer must be what is tested, not its fallback."""
    if fast.block == "fast":
        assert fast.model.block.startswith("fast/cpp-"), native.library()
    else:
        assert fast.model.block == "fast/torch+sdpa"


def test_groups_of_matrices_are_read_as_one(fast: Any) -> None:
    """The layout lays q, k, v and gate, up side by side; each group is one matrix then."""
    weights = fast.model._weights(0)
    # A bias shorter than the alignment leaves a gap behind it: its group is read part by part.
    gap = fast.model.sizes.output_bias
    assert len(weights.qkv.weights) == (3 if gap else 1)
    assert len(weights.gate_up.weights) == 1
    assert weights.gate_up.weights[0].shape == (2 * 48, 32)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("wanted", [Wanted.GENERIC, Wanted.FAST])
def test_smollm2(smollm2_folder: Path, families: ModuleType, wanted: Wanted) -> None:
    """The real model in fp32 as generate: chunks, preemption, a shared prefix, handoffs at some layers."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = json.loads((smollm2_folder / "config.json").read_text())
    tensors = {n: t.float() for n, t in load_file(smollm2_folder / "model.safetensors").items()}
    judge = AutoModelForCausalLM.from_pretrained(
        smollm2_folder, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    model = build_model(config=config, shape=shape_of(config, "float32"), device=CPU, wanted=wanted)
    model.attach(families.packed(tensors))
    tiny = families.Tiny(config=config, judge=judge, model=model)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    texts = ["The capital of France is", "def fibonacci(n):", "Once upon a time, there was a fox who"]
    prompts = [tuple(tokenizer(text)["input_ids"]) for text in texts]
    for step_tokens_max in (3, 64):
        engine = tiny.engine(step_tokens_max=step_tokens_max, page_size=16, pages=32)
        for index, prompt in enumerate(prompts):
            engine.add(families.sequence(prompt, 6, name=f"r{index}", arrived_at=index))
        events = families.run(engine)
        for index, prompt in enumerate(prompts):
            assert families.tokens(events, f"r{index}") == tiny.expected(prompt, 6)
        assert "Paris" in tokenizer.decode(families.tokens(events, "r0"))
    engine = tiny.engine(step_tokens_max=16, page_size=4, pages=8)
    for index, place in enumerate((2, 0, 2)):  # a prefix in common, and one page too few
        engine.add(families.sequence(prompts[place], 6, name=f"r{index}", arrived_at=index))
    events = families.run(engine)
    for index, place in enumerate((2, 0, 2)):
        assert families.tokens(events, f"r{index}") == tiny.expected(prompts[place], 6)
    assert engine.load().preemptions > 0 and engine.load().prefix_tokens_hit >= 8
    for k in range(0, config["num_hidden_layers"] + 1, 6):
        giver, taker = tiny.engine(), tiny.engine()
        seq = families.sequence(prompts[2], 6)
        giver.add(seq)
        giver.embed(seq)
        for _ in range(k):
            giver.run_layer(seq)
        state = bytes(giver.export_state(seq).numpy())
        giver.release(seq)
        taker.add(seq)
        taker.import_state(seq, k, state)
        assert families.tokens(families.run(taker)) == tiny.expected(prompts[2], 6)
