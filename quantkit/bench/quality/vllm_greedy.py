"""Continue prompts greedily in vLLM, for quantkit.bench.quality.engines.

    python vllm_greedy.py CHECKPOINT PROMPTS NEW OPTIONS

PROMPTS: JSON, a list of lists of token ids. NEW: tokens to write after each. OPTIONS: JSON, further arguments of
`vllm.LLM`. The last line of the output is JSON: {"version", "outputs": [{"tokens", "text", "first"}]}, where `first`
are the log-probabilities of the most likely first tokens by id. Runs in vLLM's environment and imports nothing of
quantkit.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

TOP = 20  # as many log-probabilities as vLLM gives without an option


def main(checkpoint: str, prompts: list[list[int]], new: int, options: dict[str, Any]) -> None:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # an error of the engine is then this process's own
    import vllm

    engine = vllm.LLM(
        model=checkpoint,
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=2,
        max_num_batched_tokens=512,
        disable_log_stats=True,
        **options,
    )
    greedy = vllm.SamplingParams(temperature=0, max_tokens=new, logprobs=TOP, ignore_eos=True)
    outputs = []
    for answer in engine.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False
    ):
        found = answer.outputs[0]
        first = {str(token): entry.logprob for token, entry in found.logprobs[0].items()}
        outputs.append({"tokens": list(found.token_ids), "text": found.text, "first": first})
    print("\n" + json.dumps({"version": vllm.__version__, "outputs": outputs}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]))
