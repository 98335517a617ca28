"""llama.cpp's server on one file under load, in a process of its own: called by `benchmarks.serve_load` and
`benchmarks.llama_speed`.

    python -m benchmarks.serve_llama FILE AT_ONCE TOKENS CACHE < TEXTS.json

CACHE: F32 or F16. As many threads as OMP_NUM_THREADS says, as ours.
"""

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import xllamacpp


def main() -> None:
    file, at_once, tokens, cache = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    texts = json.loads(sys.stdin.read())
    settings = xllamacpp.CommonParams()
    settings.model.path = file
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = 512 * at_once, at_once, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    settings.cache_type_k = settings.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{cache}")
    settings.warmup, settings.verbosity = False, 0
    server = xllamacpp.Server(settings)

    def one(text: str) -> int:
        asked = {"prompt": text, "max_tokens": tokens, "n_predict": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        answer = server.handle_completions(asked)
        told = json.loads(answer) if isinstance(answer, str) else answer
        return int(told["usage"]["completion_tokens"])

    one(texts[0])
    began, spent = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(at_once) as pool:
        count = sum(pool.map(one, texts))
    seconds, spent = time.perf_counter() - began, time.process_time() - spent
    print(json.dumps({"tokens_per_second": count / seconds, "per_cpu_second": count / spent}))


if __name__ == "__main__":
    main()
