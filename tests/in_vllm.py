"""Runs in vLLM's own environment: greedy texts after requests with rows beside tokens. `python in_vllm.py MODEL REQUESTS TOKENS TEXTS`"""

import json
import sys
from pathlib import Path

import torch
from vllm import LLM, SamplingParams

if __name__ == "__main__":  # vLLM imports this file again in processes of its own
    model, requests, tokens, texts = sys.argv[1:]
    engine = LLM(model=model, dtype="float32", max_model_len=512, enforce_eager=True, enable_prompt_embeds=True)
    said = engine.generate(torch.load(requests), SamplingParams(temperature=0, max_tokens=int(tokens)), use_tqdm=False)
    Path(texts).write_text(json.dumps([one.outputs[0].text for one in said]), encoding="utf-8")
