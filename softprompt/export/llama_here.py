"""llama.cpp's server in this process, by the package xllamacpp: it writes the slots of servers that run elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch

from softprompt.errors import ArtifactError, ConfigError
from softprompt.export.attaching import Place
from softprompt.export.carried import QUESTIONS, Exported, Goal
from softprompt.export.gguf import source_of
from softprompt.export.llama_server import OPTION, LlamaServer
from softprompt.extras import need

CACHE_TYPES = ("f16", "f32", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")  # that others could be written in
BLOCK = 256  # positions; a context is a multiple of it


def export(goal: Goal) -> Exported:
    """NAME.bin for each prompt, rows and deep ones alike: what a server whose slots lie in this folder restores.

    Raises MissingPackage, ConfigError without a GGUF file of the base or for a type of cache that is not known, ArtifactError for another
    base.
    """
    need("xllamacpp", "--to slots")
    file, cache_type = source_of(goal), goal.cache_type or CACHE_TYPES[0]
    if cache_type not in CACHE_TYPES:
        raise ConfigError(f"--cache-type {cache_type}: known are {', '.join(CACHE_TYPES)}")
    longest = max(prompt.soft.num_positions + len(prompt.asked(question)) for prompt in goal.prompts for question in QUESTIONS)
    with _server(file, goal.draft, (longest // BLOCK + 1) * BLOCK, cache_type) as server:
        place = Place(server, goal.draft, 0, goal.base)
        put = {prompt.name: place.put(prompt) for prompt in goal.prompts}
    start = f"llama-server -m {file} {OPTION} DIR --swa-full --flash-attn on --cache-type-k {cache_type} --cache-type-v {cache_type}"
    notes = (f"start the server with {start}; with several slots, --kv-unified",)
    worst = {name: max(one.checked[name] for one in put.values()) for name in next(iter(put.values())).checked}
    facts = {name: one.facts for name, one in put.items()}
    told = {"build": f"xllamacpp {version('xllamacpp')}", **next(iter(put.values())).cache_types}
    return Exported("slots", goal.base.name, facts, sorted(f"{name}.bin" for name in put), worst, notes, told)


@contextmanager
def _server(file: Path, folder: Path, room: int, cache_type: str) -> Iterator[LlamaServer]:
    """One slot of so many positions. Raises ArtifactError for a file that cannot be loaded."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.slot_save_path = str(file), f"{folder}/"
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers, settings.port = room, 1, 0, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
    settings.cache_type_k = settings.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{cache_type.upper()}")
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    settings.swa_full, settings.warmup, settings.verbosity = True, False, 0
    try:
        server = xllamacpp.Server(settings)
    except RuntimeError as error:
        raise ArtifactError(f"{file}: xllamacpp {version('xllamacpp')} cannot load it: {error}") from None
    yield LlamaServer(server.listening_address)
