"""Greedy continuations of a folder in vLLM, as JSON; runs in the environment of `make vllm-env`, without the package.

    .venv/vllm/bin/python tests/vllm_greedy.py FOLDER PROMPTS TOKENS MORE

PROMPTS: JSON, a list of lists of token ids. MORE: JSON, further arguments of vLLM's LLM. The last line of stdout: for
every prompt the TOKENS ids that follow, and the log-probability of each. float32, on the processor, with the folder's
own code.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main() -> None:
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    from vllm import LLM, SamplingParams

    folder, prompts, tokens, more = sys.argv[1], *(json.loads(each) for each in sys.argv[2:5])
    model: Any = LLM(
        model=folder, trust_remote_code=True, dtype="float32", enforce_eager=True, max_model_len=128, **more
    )
    greedy = SamplingParams(temperature=0.0, max_tokens=tokens, logprobs=1, ignore_eos=True, detokenize=False)
    found = []
    for answer in model.generate([{"prompt_token_ids": ids} for ids in prompts], greedy, use_tqdm=False):
        (out,) = answer.outputs
        chosen = [place[token].logprob for place, token in zip(out.logprobs, out.token_ids, strict=True)]
        found.append({"tokens": list(out.token_ids), "logprobs": chosen})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
