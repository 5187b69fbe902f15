"""vLLM as the peer of `python -m bench.engine`: run by the Python of vLLM's own environment, obeys JSON lines.

It imports nothing of ours: its environment holds vLLM and nothing else.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="0-" + str(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1) - 1),
    VLLM_CPU_NUM_OF_RESERVED_CPU="0",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine in this process: no other one spins beside it
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="ERROR",
    DO_NOT_TRACK="1",
    HF_HUB_OFFLINE="1",
)


def main() -> None:
    """Loads the model, says "ready", then times what each line asks for."""
    settings = json.loads(sys.argv[1])
    # Lines of libraries must not mix with answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch
    from vllm import LLM, SamplingParams, __version__

    torch.set_num_threads(settings["threads"])
    llm: Any = LLM(
        model=settings["model"],
        dtype=settings["dtype"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=settings["context"],
        max_num_seqs=32,
    )
    print(json.dumps({"ready": f"vllm {__version__}"}), file=answers, flush=True)
    clock = time.process_time if settings["clock"] == "cpu" else time.perf_counter
    for line in sys.stdin:
        work = json.loads(line)
        sampling = SamplingParams(
            max_tokens=work["new"], temperature=0.0, ignore_eos=True, detokenize=False, min_tokens=work["new"]
        )
        prompts = [{"prompt_token_ids": prompt} for prompt in work["prompts"]]
        started = clock()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        seconds = clock() - started
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        print(json.dumps({"seconds": seconds, "tokens": tokens}), file=answers, flush=True)


if __name__ == "__main__":
    main()
