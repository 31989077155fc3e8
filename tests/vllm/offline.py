"""Greedy tokens of a vLLM engine in this process. Run by vLLM's interpreter.

usage: offline.py FOLDER [WEIGHTS] < prompts.json > responses.json

The engine starts from an HF folder, and then loads the weights of another, as servers do after a
training step. Prompts are lists of token ids. A response is a list of pairs: token id and log-prob.
PYTHONPATH must have the folder of aropd_worker.
"""

import json
import os
import sys
from typing import Any

NUM_NEW_TOKENS = 16


def main(folder: str, *weights: str) -> None:
    prompts: list[list[int]] = json.load(sys.stdin)
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM also logs to stdout
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    engine: Any = LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        skip_tokenizer_init=True,
        worker_extension_cls="aropd_worker.Extension",
    )
    for path in weights:
        engine.collective_rpc("aropd_reload_weights", kwargs={"weights_path": path})
    params = SamplingParams(
        temperature=0, max_tokens=NUM_NEW_TOKENS, ignore_eos=True, logprobs=0, detokenize=False
    )
    results = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    responses = []
    for [completion] in (result.outputs for result in results):
        pairs = zip(completion.token_ids, completion.logprobs, strict=True)
        responses.append([(token, of_token[token].logprob) for token, of_token in pairs])
    json.dump(responses, output)
    output.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
