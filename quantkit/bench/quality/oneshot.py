"""Run llm-compressor's GPTQ or AWQ on given token windows, for quantkit.bench.quality.cost and .mixtures.

    PYTHON -I quantkit/bench/quality/oneshot.py MODEL WINDOWS.json gptq|awq [SAVE BITS GROUP]

Runs in the environment of llm-compressor and knows nothing of quantkit: one thread, fp32, 4 bits in groups of 128 and
nothing saved, or symmetric BITS in groups of GROUP and the checkpoint in the folder SAVE. WINDOWS.json is a list of
lists of token ids. The last line of stdout is {"cpu_seconds": of the oneshot call, "versions": {..}}.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("llmcompressor", "compressed-tensors", "torch", "transformers")


IGNORED = ["lm_head", "re:.*gate$"]  # head and routers


def modifier(method: str, bits: int = 4, group: int = 128) -> Any:
    """llm-compressor's modifier for `method`: all linears but head and routers."""
    if method == "gptq":
        from compressed_tensors.quantization import preset_name_to_scheme
        from llmcompressor.modifiers.quantization import GPTQModifier

        scheme = preset_name_to_scheme("W4A16", targets=["Linear"])
        scheme.weights.num_bits, scheme.weights.group_size = bits, group
        return GPTQModifier(config_groups={"all": scheme}, ignore=IGNORED)
    from llmcompressor.modifiers.awq import AWQModifier

    return AWQModifier(targets="Linear", scheme="W4A16_ASYM", ignore=IGNORED)


def main(model: str, windows: str, method: str, save: str = "", bits: str = "4", group: str = "128") -> None:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    if not torch.accelerator.is_available():  # AWQ pins its cache all the same, and 0.14 fails at it
        setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # noqa: B010
    ids = json.loads(Path(windows).read_text())
    text = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(window) for window in ids]})
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=False)
    recipe = [modifier(method, int(bits), int(group))]
    start = time.process_time()
    oneshot(
        model=network,
        dataset=text,
        recipe=recipe,
        max_seq_length=len(ids[0]),
        num_calibration_samples=len(ids),
        log_dir=None,
    )
    seconds = time.process_time() - start
    if save:
        network.save_pretrained(save, save_compressed=True)
    print(json.dumps({"cpu_seconds": seconds, "versions": {name: version(name) for name in PACKAGES}}))


if __name__ == "__main__":
    main(*sys.argv[1:])
