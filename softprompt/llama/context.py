"""llama.cpp in this process, by the functions that the library inside the package xllamacpp exports: a model and one context over it.

How its settings lie in memory differs from build to build. So a build is taken only if the settings that it gives as its defaults,
read as they lie in the builds that are known, are those of these builds, each of them.

Source: llama.cpp, include/llama.h.
"""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int32, c_size_t, c_uint32, c_void_p
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from softprompt.errors import ModelError, RunError
from softprompt.extras import need

KNOWN = "2026.10.11549"  # the build of xllamacpp whose settings are these
SEQUENCES = 256  # that llama.cpp has at most
BATCH, AT_ONCE = 2048, 512  # tokens that it is given, and computes, at a time
TYPES = {"f32": 0, "f16": 1}
FLASH, ERROR = 1, 4


class ModelSettings(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("devices", "tensor_buft_overrides")),
        *((name, c_int32) for name in ("n_gpu_layers", "split_mode", "load_mode", "lazy_mode", "main_gpu")),
        *((name, c_void_p) for name in ("tensor_split", "progress_callback", "progress_callback_user_data", "kv_overrides")),
        *((name, c_bool) for name in ("vocab_only", "check_tensors", "use_extra_bufts", "no_host", "no_alloc", "load_mtp")),
    )


class ContextSettings(ctypes.Structure):
    _fields_ = (
        *((name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq", "n_outputs_max", "n_outputs_max_per_seq")),
        *((name, c_int32) for name in ("n_threads", "n_threads_batch")),
        *((name, c_int) for name in ("ctx_type", "rope_scaling_type", "pooling_type", "attention_type", "flash_attn_type")),
        *((name, c_float) for name in ("rope_freq_base", "rope_freq_scale")),
        *((name, c_float) for name in ("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow")),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        *((name, c_void_p) for name in ("cb_eval", "cb_eval_user_data")),
        *((name, c_int) for name in ("type_k", "type_v")),
        ("moe_cache_size", c_size_t),
        *((name, c_void_p) for name in ("abort_callback", "abort_callback_data")),
        *((name, c_bool) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    )


DEFAULTS: dict[type[ctypes.Structure], dict[str, Any]] = {  # all others are 0, false and null
    ModelSettings: {"n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1, "use_extra_bufts": True},
    ContextSettings: {
        "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_outputs_max_per_seq": 1, "n_threads": 4, "n_threads_batch": 4,
        "rope_scaling_type": -1, "pooling_type": -1, "attention_type": -1, "flash_attn_type": -1, "yarn_ext_factor": -1.0,
        "yarn_attn_factor": -1.0, "yarn_beta_fast": -1.0, "yarn_beta_slow": -1.0, "defrag_thold": -1.0, "type_k": 1, "type_v": 1,
        "offload_kqv": True, "no_perf": True, "op_offload": True, "swa_full": True,
    },
}  # fmt: skip


class Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", c_int32),
        *((name, c_void_p) for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")),
    )


FUNCTIONS: dict[str, tuple[Any, ...]] = {  # what each returns, then what it takes
    "llama_backend_init": (None,),
    "llama_log_set": (None, c_void_p, c_void_p),
    "llama_model_default_params": (ModelSettings,),
    "llama_context_default_params": (ContextSettings,),
    "llama_model_load_from_file": (c_void_p, c_char_p, ModelSettings),
    "llama_model_free": (None, c_void_p),
    "llama_init_from_model": (c_void_p, c_void_p, ContextSettings),
    "llama_free": (None, c_void_p),
    "llama_get_memory": (c_void_p, c_void_p),
    "llama_memory_seq_rm": (c_bool, c_void_p, c_int32, c_int32, c_int32),
    "llama_memory_seq_cp": (None, c_void_p, c_int32, c_int32, c_int32, c_int32),
    "llama_decode": (c_int32, c_void_p, Batch),
    "llama_get_logits_ith": (POINTER(c_float), c_void_p, c_int32),
    "llama_state_seq_get_size": (c_size_t, c_void_p, c_int32),
    "llama_state_seq_get_data": (c_size_t, c_void_p, c_char_p, c_size_t, c_int32),
    "llama_state_seq_set_data": (c_size_t, c_void_p, c_char_p, c_size_t, c_int32),
    "llama_n_ctx": (c_uint32, c_void_p),
    "llama_model_get_vocab": (c_void_p, c_void_p),
    "llama_vocab_n_tokens": (c_int32, c_void_p),
    "llama_model_n_embd_inp": (c_int32, c_void_p),
    "llama_model_rope_type": (c_int, c_void_p),
    **{f"llama_model_{what}": (c_bool, c_void_p) for what in ("is_recurrent", "is_hybrid", "is_diffusion", "has_encoder")},
}

_said: list[str] = []


def _hear(level: int, text: bytes | None, _: Any) -> None:
    if level == ERROR and text:
        _said.append(text.decode(errors="replace").strip())


_heard = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(_hear)


@cache
def library() -> Any:
    """Its functions. Raises MissingPackage, and ModelError for a build whose structures are not known."""
    need("xllamacpp", "--engine llama")
    import xllamacpp

    file = next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.*[od]"))
    unknown = f"xllamacpp {version('xllamacpp')} is a build that --engine llama does not know: pip install xllamacpp=={KNOWN}"
    found = ctypes.CDLL(str(file))
    try:
        for name, (returned, *given) in FUNCTIONS.items():
            function = getattr(found, name)
            function.restype, function.argtypes = returned, given
    except AttributeError:
        raise ModelError(unknown) from None
    for kind, known in DEFAULTS.items():
        settings = found.llama_model_default_params() if kind is ModelSettings else found.llama_context_default_params()
        said = {name: getattr(settings, name) for name, *_ in kind._fields_}
        if {name: value for name, value in said.items() if value} != known:
            raise ModelError(unknown)
    found.llama_log_set(ctypes.cast(_heard, c_void_p), None)
    found.llama_backend_init()
    return found


class NoRoom(Exception):
    """No positions are left for what is to be read. Nothing was."""


@dataclass(frozen=True)
class Piece:
    """What a sequence is to read from a position on: ids of tokens, or rows [P, H]. `wanted`: of which of them the logits, by index."""

    sequence: int
    position: int
    read: Sequence[int] | Tensor
    wanted: Sequence[int] = ()


class Context:
    """A GGUF file as llama.cpp holds it, and room for `positions`, shared by all sequences. Raises ModelError where it cannot be loaded."""

    def __init__(self, file: Path, positions: int, cache_type: Literal["f16", "f32"], threads: int, *, gpu: bool) -> None:
        self._library = library()
        self._model = self._loaded(file, gpu)
        settings = self._library.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = positions, BATCH, AT_ONCE
        settings.n_seq_max = SEQUENCES
        settings.n_outputs_max = settings.n_outputs_max_per_seq = AT_ONCE
        settings.n_threads = settings.n_threads_batch = threads
        settings.flash_attn_type, settings.type_k, settings.type_v = FLASH, TYPES[cache_type], TYPES[cache_type]
        settings.kv_unified = settings.swa_full = True
        self._context = self._library.llama_init_from_model(self._model, settings)
        if not self._context:
            raise ModelError(f"{file}: llama.cpp has no room for {positions} positions beside it: {_reason()}")
        self._memory = self._library.llama_get_memory(self._context)
        self._at_once = min(AT_ONCE, self.num_positions)  # more than fit end the process
        self.num_logits: int = self._library.llama_vocab_n_tokens(self._library.llama_model_get_vocab(self._model))

    def _loaded(self, file: Path, gpu: bool) -> Any:
        _said.clear()
        settings = self._library.llama_model_default_params()
        if not gpu:
            settings.n_gpu_layers = 0
        model = self._library.llama_model_load_from_file(str(file).encode(), settings)
        if not model:
            raise ModelError(f"{file}: llama.cpp (xllamacpp {version('xllamacpp')}) cannot load it: {_reason()}")
        kinds = ("is_recurrent", "is_hybrid", "is_diffusion", "has_encoder")
        if any(getattr(self._library, f"llama_model_{kind}")(model) for kind in kinds):
            self._library.llama_model_free(model)
            raise ModelError(f"{file}: its layers keep states or something else beside keys and values: --engine llama cannot serve it")
        return model

    @property
    def num_positions(self) -> int:
        return int(self._library.llama_n_ctx(self._context))

    @property
    def row_size(self) -> int:
        return int(self._library.llama_model_n_embd_inp(self._model))

    @property
    def turned(self) -> int:
        """How it turns keys by their positions: llama_rope_type."""
        return int(self._library.llama_model_rope_type(self._model))

    def read(self, pieces: Sequence[Piece]) -> Tensor:
        """[wanted, V] float32. All pieces are ids, or there is one of rows. Raises NoRoom, then nothing is read."""
        rows = pieces[0].read if isinstance(pieces[0].read, Tensor) else None
        numbers = [token for piece in pieces for token in piece.read] if rows is None else range(len(rows))
        positions = [piece.position + index for piece in pieces for index in range(len(piece.read))]
        sequences = [piece.sequence for piece in pieces for _ in range(len(piece.read))]
        wanted = [index in piece.wanted for piece in pieces for index in range(len(piece.read))]
        found = torch.empty(sum(wanted), self.num_logits)
        at = 0
        for first in range(0, len(positions), self._at_once):
            part = slice(first, first + self._at_once)
            given = np.array(numbers[part], np.int32) if rows is None else rows[part].float().contiguous().numpy()
            where = (np.array(positions[part], np.int32), np.array(sequences[part], np.int32), np.array(wanted[part], np.int8))
            try:
                self._decode(given, *where)
            except NoRoom:
                for piece in pieces:
                    self.clear(piece.sequence, piece.position)
                raise
            for index in np.flatnonzero(wanted[part]):
                logits = self._library.llama_get_logits_ith(self._context, int(index))
                ctypes.memmove(found[at].data_ptr(), logits, 4 * self.num_logits)
                at += 1
        return found

    def _decode(self, given: Any, positions: Any, sequences: Any, wanted: Any) -> None:
        _said.clear()
        once = np.ones(len(positions), np.int32)
        places = sequences.ctypes.data + 4 * np.arange(len(positions), dtype=np.uintp)
        batch = Batch(len(positions), None, None, *(one.ctypes.data for one in (positions, once, places, wanted)))
        setattr(batch, "token" if given.ndim == 1 else "embd", given.ctypes.data)
        answered = self._library.llama_decode(self._context, batch)
        if answered == 1:
            raise NoRoom
        if answered:
            raise RunError(f"llama.cpp could not compute: {_reason()}")

    def copy(self, source: int, target: int) -> None:
        """What one sequence has read another has, too; nothing is moved."""
        self._library.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def clear(self, sequence: int, first: int = -1) -> None:
        """It has read nothing, or nothing from a position on."""
        self._library.llama_memory_seq_rm(self._memory, sequence, first, -1)

    def state(self, sequence: int) -> bytes:
        """What the layers keep of it, as this build writes it."""
        room = ctypes.create_string_buffer(self._library.llama_state_seq_get_size(self._context, sequence))
        written = self._library.llama_state_seq_get_data(self._context, room, len(room), sequence)
        return room.raw[:written]

    def put(self, sequence: int, state: bytes) -> None:
        """Such a state in its place. Raises NoRoom."""
        if self._library.llama_state_seq_set_data(self._context, state, len(state), sequence) != len(state):
            raise NoRoom

    def __del__(self) -> None:
        if getattr(self, "_context", None):
            self._library.llama_free(self._context)
        if getattr(self, "_model", None):
            self._library.llama_model_free(self._model)


def _reason() -> str:
    """What it said of its own."""
    return _said[-1] if _said else "it does not say why"
