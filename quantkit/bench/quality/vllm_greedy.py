"""Continue prompts greedily in vLLM, checkpoint after checkpoint, for quantkit.bench.quality.engines.

    python vllm_greedy.py FILE

FILE: JSON, [{"checkpoint", "prompts" (lists of token ids), "new" (tokens to write), "options" (of `vllm.LLM`)}].

For each, in order, one line of the output begins with RESULT and goes on with JSON: {"version", "outputs": [{"tokens",
"text", "first"}]}, where `first` are the log-probabilities of the most likely first tokens by id; or {"error"}. vLLM is
imported once; each checkpoint runs in a process of its own, forked from there. Runs in vLLM's environment and imports
nothing of quantkit.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from typing import Any

TOP = 20  # as many log-probabilities as vLLM gives without an option
SECONDS = 900  # after which a checkpoint is given up
RESULT = "RESULT "


def answer(checkpoint: str, prompts: list[list[int]], new: int, options: dict[str, Any]) -> dict[str, Any]:
    """What vLLM writes after the prompts."""
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
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    for one in engine.generate(asked, greedy, use_tqdm=False):
        found = one.outputs[0]
        first = {str(token): entry.logprob for token, entry in found.logprobs[0].items()}
        outputs.append({"tokens": list(found.token_ids), "text": found.text, "first": first})
    return {"version": vllm.__version__, "outputs": outputs}


def apart(job: dict[str, Any]) -> dict[str, Any]:
    """The answer to one job, or {"error"}, from a forked process, which may die of anything."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        signal.alarm(SECONDS)
        try:
            said: dict[str, Any] = answer(**job)
        except BaseException as error:
            traceback.print_exc()
            said = {"error": f"{type(error).__name__}: {error}"}
        with os.fdopen(writing, "w") as pipe:
            pipe.write(json.dumps(said))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if not text:
        return {"error": f"the process ended with status {os.waitstatus_to_exitcode(status)}"}
    found: dict[str, Any] = json.loads(text)
    return found


def main(file: str) -> None:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # an error of the engine is then this process's own
    with open(file, encoding="utf-8") as jobs:
        asked = json.load(jobs)
    from vllm import LLM, SamplingParams  # noqa: F401  (before the first fork, so that all share it)

    for job in asked:
        print("\n" + RESULT + json.dumps(apart(job)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
