"""Asks a server through LiteLLM, in an environment of its own: `with_litellm.py URL`; writes what it was told as JSON."""

import json
import sys

import litellm

there = {"model": "openai/polite", "api_base": f"{sys.argv[1]}/v1", "api_key": "none", "max_retries": 0}
asked = {"messages": [{"role": "user", "content": "one two three"}], "max_tokens": 2, "user": "ann", "seed": 3, "stop": ["x"], "top_p": 0.9}
whole = litellm.completion(**there, **asked, logprobs=True, top_logprobs=2)
chunks = list(litellm.completion(**there, **asked, stream=True, stream_options={"include_usage": True}))
text = litellm.text_completion(**{**there, "model": "text-completion-openai/polite"}, prompt="one two", max_tokens=1)
try:
    litellm.completion(**{**there, "model": "openai/none"}, **asked)
    error = ""
except litellm.NotFoundError as found:
    error = str(found)
said = {
    "whole": whole.choices[0].message.content,
    "finish": whole.choices[0].finish_reason,
    "tokens": [one["token"] for one in whole.choices[0].logprobs["content"]],
    "stream": "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
    "usage": [whole.usage.prompt_tokens, whole.usage.completion_tokens, chunks[-1].usage.completion_tokens],
    "text": text.choices[0].text,
    "error": error,
}
print(json.dumps(said))
