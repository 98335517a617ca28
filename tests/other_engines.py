"""Other engines: prompts to carry to them, the tiny llama as a GGUF file, llama.cpp and its server in this process, vLLM's in another."""

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import takewhile
from pathlib import Path
from threading import Thread
from typing import Any

import gguf
import torch
from gguf import GGUFWriter, TokenType
from torch import Tensor

from softprompt import load_prompt
from softprompt.artifact import make_card, write_prompt
from softprompt.card import DataCard
from softprompt.config import load_config
from softprompt.encode import make_encoder
from softprompt.engine.model import FrozenBase
from softprompt.engine.prompt import Prompt, SoftPrompt, deepened
from softprompt.generation import Sampling, generate

LENGTH = 5
MERGED = "Ā Ā"  # two NUL bytes: no text of a test has them

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def some_prompt(
    folder: Path,
    base: FrozenBase,
    seed: int = 0,
    *,
    template: str = "human-assistant",
    position: str | None = None,
    model: str | None = None,
    text: str | None = None,
    length: int = LENGTH,
    deep: bool = False,
) -> Path:
    """A prompt folder as training writes it, its rows drawn from the vocabulary, or those of a text; then moved by noise. `deep`: their
    keys and values, moved by noise too, so that no rows give them.

    `model`: the setting that names the base.
    """
    encoder = make_encoder(base.tokenizer, template)
    generator = torch.Generator().manual_seed(seed)
    start = base.drawn_rows(length, seed) if text is None else base.embed_ids(base.tokenizer(text, add_special_tokens=False)["input_ids"])
    rows = start + base.rms * (1.0 if text is None else 0.1) * torch.randn(start.shape, generator=generator)
    own = position or ("start" if encoder.bos_id is None else "after_bos")
    method = ("prompt.method=prefix",) if deep else ()
    config = load_config(
        None, [model or f"model.name={base.name}", "model.device=cpu", "model.dtype=float32", "prompt.text=x", "data.train=x", *method]
    )
    data = DataCard(train="x", num_train=1, train_fingerprint="", num_eval=0, eval_fingerprint=None, labels=(), label_words={})
    soft: Prompt = SoftPrompt(rows, own, encoder.bos_id)
    if deep:
        keys = deepened(base, rows, own, encoder.bos_id)
        soft = keys.with_learned(keys.learned_PD + 0.3 * torch.randn(keys.learned_PD.shape, generator=generator))
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_prompt(folder, soft, make_card(config, base, soft, encoder, data, "random", {}), base)
    return folder


def our_answers(base: FrozenBase, folder: Path, questions: list[str], tokens: int) -> list[str]:
    return generate(base, load_prompt(folder, base), questions, Sampling(max_new_tokens=tokens))


def mlx_answers(folder: Path, texts: Sequence[Sequence[int]], tokens: int, ends: Sequence[int], prompt: Path | None = None) -> list[str]:
    """Greedy answers of MLX behind a prompt cache, one text after the other."""
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import load_prompt_cache

    model, tokenizer = load(str(folder))[:2]
    stops, found = {*ends, *tokenizer.eos_token_ids}, []
    for text in texts:
        cache = load_prompt_cache(str(prompt)) if prompt else None
        steps = generate_step(mx.array(list(text)), model, max_tokens=tokens, prompt_cache=cache)
        found.append(tokenizer.decode([*takewhile(lambda token: token not in stops, (token for token, _ in steps))]))
    return found


def tiny_gguf(path: Path, base: FrozenBase, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32) -> Path:
    """The base (tiny llama) in llama.cpp's form, its table in this quantisation, all else in float32."""
    settings, weights = base.model.config, base.model.state_dict()
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(settings.num_hidden_layers)
    writer.add_context_length(settings.max_position_embeddings)
    writer.add_embedding_length(settings.hidden_size)
    writer.add_feed_forward_length(settings.intermediate_size)
    writer.add_head_count(settings.num_attention_heads)
    writer.add_head_count_kv(settings.num_key_value_heads)
    writer.add_layer_norm_rms_eps(settings.rms_norm_eps)
    writer.add_rope_freq_base(settings.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(settings.hidden_size // settings.num_attention_heads)
    writer.add_vocab_size(settings.vocab_size)
    _add_vocabulary(writer, base.tokenizer, settings.vocab_size)
    for name, own in (("embed_tokens", "token_embd"), ("norm", "output_norm")):
        _add(writer, f"{own}.weight", weights[f"model.{name}.weight"], kind if name == "embed_tokens" else gguf.GGMLQuantizationType.F32)
    if not settings.tie_word_embeddings:
        _add(writer, "output.weight", weights["lm_head.weight"], kind)
    for layer in range(settings.num_hidden_layers):
        for name, own in NAMES.items():
            weight = weights[f"model.layers.{layer}.{name}.weight"]
            heads = {"attn_q": settings.num_attention_heads, "attn_k": settings.num_key_value_heads}.get(own)
            _add(
                writer, f"blk.{layer}.{own}.weight", weight if heads is None else _interleaved(weight, heads), gguf.GGMLQuantizationType.F32
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: GGUFWriter, name: str, weight: Tensor, kind: gguf.GGMLQuantizationType) -> None:
    writer.add_tensor(name, gguf.quants.quantize(weight.float().numpy(), kind), raw_dtype=kind)


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp turns neighbouring numbers of a head, transformers its two halves."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape).contiguous()


def _add_vocabulary(writer: GGUFWriter, tokenizer: Any, size: int) -> None:
    listed = {token: text for text, token in tokenizer.get_vocab().items()}
    special = set(tokenizer.all_special_ids)
    kinds = [TokenType.UNUSED if n not in listed else TokenType.CONTROL if n in special else TokenType.NORMAL for n in range(size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    texts = [listed.get(number, f"[PAD{number}]") for number in range(size)]
    if size - 1 not in listed:  # what the merge gives is a token too, in the place of one that nothing uses
        texts[-1] = MERGED.replace(" ", "")
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_token_merges([MERGED, MERGED])  # none cannot be written, and transformers 5.15 takes a list of one for its only text
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)


class LlamaServer:
    """llama.cpp's server on a file, one thread, in this process; over HTTP at `address`. `slots`: the folder that it keeps these in."""

    def __init__(self, file: Path, slots: Path | None = None, kind: str = "F32", room: int = 512, **how: Any) -> None:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        settings.n_ctx, settings.n_parallel, settings.n_gpu_layers, settings.port = room, 1, 0, 0
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        settings.cache_type_k = settings.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{kind}")
        settings.use_jinja, settings.warmup, settings.verbosity = True, False, 0
        settings.slot_save_path = "" if slots is None else f"{slots}/"
        for name, value in how.items():
            setattr(settings, name, value)
        self.server = xllamacpp.Server(settings)
        self.address = self.server.listening_address

    def chat(self, question: str, tokens: int, **how: Any) -> str:
        turns = [{"role": "user", "content": question}]
        return self._ask(self.server.handle_chat_completions, messages=turns, max_tokens=tokens, **how)["choices"][0]["message"]["content"]

    def complete(self, prompt: str | list[int], tokens: int, **how: Any) -> str:
        return self._ask(self.server.handle_completions, prompt=prompt, max_tokens=tokens, n_predict=tokens, **how)["choices"][0]["text"]

    @staticmethod
    def _ask(handle: Any, **request: Any) -> dict[str, Any]:
        answer = handle({"temperature": 0, **request})
        answer = json.loads(answer) if isinstance(answer, str) else answer
        assert "error" not in answer, answer
        return answer


def from_slot(address: str, facts: dict[str, Any], asked: Sequence[int], tokens: int, slot: int = 0) -> dict[str, Any]:
    """What a server answers behind a prompt, by the two requests that `softprompt attach` shows, with another question's ids and slot."""
    _post(f"{address}/slots/{slot}?action=restore", facts["restore"])
    given = {"prompt": [*facts["ids"], *asked], "id_slot": slot, "n_predict": tokens}
    return _post(f"{address}/completion", {**facts["request"], **given})


@contextmanager
def relayed(
    address: str,
    ends_after: int = 1 << 30,
    before: Callable[[str, dict[str, Any]], None] = lambda path, request: None,
    after: Callable[[str], None] = lambda path: None,
) -> Iterator[str]:
    """The address of a relay to a server. It hangs up on all requests but the first `ends_after`. `before` may alter a request, by its
    path; `after` is told of the path when the server has answered."""
    left = [ends_after]

    class Relay(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            left[0] -= 1
            if left[0] < 0:
                return
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            request = json.loads(body) if body else None
            before(self.path, request if request is not None else {})
            sent = urllib.request.Request(address + self.path, None if request is None else json.dumps(request).encode())
            try:
                with urllib.request.urlopen(sent) as answer:
                    code, said = 200, answer.read()
            except urllib.error.HTTPError as error:
                code, said = error.code, error.read()
            after(self.path)
            self.send_response(code)
            self.end_headers()
            self.wfile.write(said)

        do_POST = do_GET

        def log_message(self, *args: Any) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Relay) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class LlamaCpp:
    """llama.cpp's C interface on a file, one thread, what it keeps in float32. A text is pieces: ids of tokens, or rows [P, H].

    The declarations are those of llama-cpp-py-sync, the library is the one inside xllamacpp, of the same build but for one.
    """

    def __init__(self, file: Path) -> None:
        import xllamacpp
        from llama_cpp_py_sync._cffi_bindings import get_ffi

        self.ffi = get_ffi()
        self.library = self.ffi.dlopen(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
        self.library.llama_backend_init()
        settings = self.library.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = 512
        settings.n_threads = settings.n_threads_batch = 1
        settings.type_k = settings.type_v = gguf.GGMLQuantizationType.F32.value
        model = self.library.llama_model_load_from_file(str(file).encode(), self.library.llama_model_default_params())
        self.context = self.library.llama_init_from_model(model, settings)
        vocabulary = self.library.llama_model_get_vocab(model)
        self.size, self.eos = self.library.llama_vocab_n_tokens(vocabulary), self.library.llama_vocab_eos(vocabulary)

    def logits(self, *pieces: list[int] | Tensor) -> Tensor:
        """[V] float32: behind the last position."""
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)
        return [self._read(piece, at) for piece, at in zip(pieces, _starts(pieces), strict=True)][-1]

    def answer(self, tokens: int, *pieces: list[int] | Tensor) -> list[int]:
        """Greedy ids."""
        logits_V, at = self.logits(*pieces), sum(map(len, pieces))
        said: list[int] = []
        while len(said) < tokens and (token := int(logits_V.argmax())) != self.eos:
            said.append(token)
            logits_V, at = self._read([token], at), at + 1
        return said

    def _read(self, piece: list[int] | Tensor, at: int) -> Tensor:
        batch = self.library.llama_batch_init(len(piece), 0 if isinstance(piece, list) else piece.shape[1], 1)
        try:
            batch.n_tokens = len(piece)
            if isinstance(piece, list):
                batch.token[0 : len(piece)] = piece
            else:
                self.ffi.memmove(batch.embd, piece.float().contiguous().numpy(), piece.numel() * 4)
            for index in range(len(piece)):
                batch.pos[index], batch.n_seq_id[index], batch.seq_id[index][0] = at + index, 1, 0
                batch.logits[index] = index == len(piece) - 1
            assert self.library.llama_decode(self.context, batch) == 0
            given = self.library.llama_get_logits_ith(self.context, len(piece) - 1)
            return torch.frombuffer(bytearray(self.ffi.buffer(given, self.size * 4)), dtype=torch.float32)
        finally:
            self.library.llama_batch_free(batch)


def _starts(pieces: Sequence[list[int] | Tensor]) -> list[int]:
    return [sum(map(len, pieces[:index])) for index in range(len(pieces))]


def in_float32(source: Path, target: Path) -> Path:
    """A GGUF file with every tensor in float32."""
    reader = gguf.GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[0]
            writer.add_key_value(field.name, field.contents(), kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


# ---- vLLM, in an environment of its own ----------------------------------------------------------------------------

STARTS_WITHIN = 300  # seconds
CLIENTS = 8
CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
Ask = Callable[[str, dict[str, Any]], list[dict[str, Any]]]


@contextmanager
def vllm_serves(model: Path, tokens: int, log: Path, *how: str) -> Iterator[Ask]:
    """Inside, `vllm serve` runs on the model. What it gives sends a request, by default a greedy one, and returns the choices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # what `vllm serve` runs; the command itself asks for a package called vllm, and vllm-cpu is called otherwise
    command = [
        os.environ["VLLM_PYTHON"],
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(model),
        "--served-model-name",
        "served",
    ]
    command += ["--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--port", str(port), *how]

    def ask(path: str, request: dict[str, Any]) -> list[dict[str, Any]]:
        whole = {"model": "served", "temperature": 0, "max_tokens": tokens, **request}
        return _post(f"http://127.0.0.1:{port}/v1/{path}", whole)["choices"]

    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | CPU, cwd=log.parent) as server:
        try:
            _wait_for(server, f"http://127.0.0.1:{port}/health", log)
            yield ask
        finally:
            server.terminate()


def side_by_side(ask: Ask, path: str, requests: Sequence[dict[str, Any]]) -> list[str]:
    """The texts of the first choices, in the order of the requests."""
    with ThreadPoolExecutor(CLIENTS) as clients:
        firsts = [choices[0] for choices in clients.map(lambda request: ask(path, request), requests)]
    return [first["message"]["content"] if "message" in first else first["text"] for first in firsts]


def vllm_offline(model: Path, requests: list[dict[str, Any]], tokens: int, folder: Path) -> list[str]:
    """Greedy texts by vLLM's LLM, without a server."""
    torch.save(requests, folder / "requests.pt")
    script = Path(__file__).with_name("in_vllm.py")
    places = [str(model), str(folder / "requests.pt"), str(tokens), str(folder / "texts.json")]
    subprocess.run([os.environ["VLLM_PYTHON"], str(script), *places], check=True, cwd=folder, env=os.environ | CPU)
    return json.loads((folder / "texts.json").read_text(encoding="utf-8"))


def _wait_for(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    began = time.monotonic()
    while time.monotonic() - began < STARTS_WITHIN and server.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise RuntimeError(f"vllm serve did not start:\n{log.read_text()[-4000:]}")


def _post(address: str, request: dict[str, Any]) -> dict[str, Any]:
    sent = urllib.request.Request(address, json.dumps(request).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(sent, timeout=600) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{address}: {error.code}: {error.read().decode()[:1000]}") from None
