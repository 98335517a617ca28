"""Trained prompts in vLLM: a KV connector that gives requests the keys and values of the prompt that they begin with.

vLLM loads this file by itself; it needs torch, safetensors and vLLM 0.32, and nothing else of softprompt:

    PYTHONPATH=FOLDER vllm serve BASE --kv-transfer-config '{"kv_connector": "SoftPromptConnector",
        "kv_connector_module_path": "softprompt_connector", "kv_role": "kv_consumer", "kv_connector_extra_config": {"folder": "FOLDER"}}'

FOLDER holds `index.json`, {KEY: {"ids": [...]}}, and `KEY.safetensors` for each: "keys.N" and "values.N" [P, kv heads, head size] of
every layer N, rotated as in the cache. A request whose first token ids are a prompt's P `ids` continues from that prompt; the ids are
nothing but its name. Prompts come and go while vLLM runs: the index is read again when it has changed.

A request for scores of its text (`prompt_logprobs`) is not let near caches by vLLM: it computes the ids too, and the prompt's keys and
values are put over theirs in every layer before attention reads them.
"""

import json
import logging
import os
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorBase_V1, KVConnectorRole, SupportsHMA
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorTransferResults
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import AttentionSpec, MLAAttentionSpec, SlidingWindowMLASpec

KEPT = 64  # prompts whose tensors a worker keeps in memory
NULL_BLOCK = 0  # stands where a sliding layer needs no block any more
log = logging.getLogger("vllm.softprompt")


@dataclass(frozen=True)
class Load:
    """Positions `start` to `stop` of a prompt go into these blocks of every cache group; `over` the ones that are computed in this step."""

    file: str
    start: int
    stop: int
    block_ids: tuple[list[int], ...]
    over: bool


@dataclass
class Loads(KVConnectorMetadata):  # type: ignore[misc]
    """What the workers do in a step. `failed`: requests whose prompt cannot be had, which vLLM then ends with an error."""

    loads: list[Load] = field(default_factory=list)
    failed: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Known:
    """A prompt of the index, and what is wrong with its file, if anything."""

    ids: tuple[int, ...]
    file: str
    fault: str | None


class SoftPromptConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """One object lives in the scheduler and finds the prompts of requests, one in each worker and writes keys and values."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._folder = Path(self._kv_transfer_config.get_from_extra_config("folder", None) or Path(__file__).parent)
        self._dtype = vllm_config.model_config.dtype
        self._layers = vllm_config.compilation_config.static_forward_context
        self._group_of = {name: index for index, group in enumerate(kv_cache_config.kv_cache_groups) for name in group.layer_names}
        specs = {name: _spec(kv_cache_config.kv_cache_groups[index].kv_cache_spec, name) for name, index in self._group_of.items()}
        for name, spec in specs.items():
            if not isinstance(spec, AttentionSpec) or isinstance(spec, MLAAttentionSpec | SlidingWindowMLASpec):
                raise ValueError(f"{name} keeps something else than keys and values ({type(spec).__name__}): no prompt can stand there")
        self._specs = specs
        # of the scheduler
        self._index: dict[int, list[Known]] = {}  # by the first of their ids
        self._stamp: tuple[int, ...] = ()
        self._loads = Loads()
        self._failing: set[str] = set()
        self._over: dict[str, Known] = {}
        # of a worker
        self._read = lru_cache(KEPT)(self._read_file)

    # ---- scheduler: which prompt a request begins with

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """The positions of its prompt that are not there yet. An asynchronous load is one that is going to fail."""
        known = self._prompt_of(request)
        if known is None:
            return 0, False
        fault = known.fault
        if fault is None and not (self._folder / known.file).is_file():
            fault = "its file is gone"
        if fault is None and request.num_prompt_tokens <= len(known.ids):
            fault = "no text stands behind it"
        if fault is not None:
            log.error("request %s: its prompt %s cannot be used: %s", request.request_id, known.file, fault)
            self._failing.add(request.request_id)
            return max(1, request.num_prompt_tokens - 1 - num_computed_tokens), True
        return max(0, len(known.ids) - num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if request.request_id in self._failing:
            self._failing.discard(request.request_id)
            self._loads.failed.add(request.request_id)
            return
        known = self._prompt_of(request)
        if known is None:
            return
        if request.skip_reading_prefix_cache:
            self._over[request.request_id] = known
        elif num_external_tokens:
            stop = len(known.ids)
            self._loads.loads.append(Load(known.file, stop - num_external_tokens, stop, blocks.get_block_ids(), over=False))

    def build_connector_meta(self, scheduler_output: Any) -> Loads:
        begun = {one.req_id: one.num_computed_tokens for one in scheduler_output.scheduled_new_reqs} if self._over else {}
        cached = scheduler_output.scheduled_cached_reqs
        begun |= zip(cached.req_ids, cached.num_computed_tokens, strict=True) if self._over else ()
        for request_id, known in self._over.items():
            start = begun.get(request_id, len(known.ids))
            stop = min(len(known.ids), start + scheduler_output.num_scheduled_tokens.get(request_id, 0))
            if start < stop:
                block_ids = scheduler_output.kv_connector_block_state.get_block_ids(request_id)
                self._loads.loads.append(Load(known.file, start, stop, block_ids, over=True))
        loads, self._loads = self._loads, Loads()
        return loads

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(self, request: Any, block_ids: tuple[list[int], ...]) -> tuple[bool, None]:
        self._over.pop(request.request_id, None)
        self._failing.discard(request.request_id)
        return False, None

    def _prompt_of(self, request: Any) -> Known | None:
        ids = request.prompt_token_ids
        if not ids:
            return None
        self._refresh()
        return next((known for known in self._index.get(ids[0], ()) if tuple(ids[: len(known.ids)]) == known.ids), None)

    def _refresh(self) -> None:
        """Reads the index again where it has changed; one that cannot be read changes nothing."""
        file = self._folder / "index.json"
        try:
            found = os.stat(file)
            stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
            if stamp == self._stamp:
                return
            self._stamp = stamp
            good = {known.file: known for same in self._index.values() for known in same if known.fault is None}
            index: dict[int, list[Known]] = {}
            for key, entry in json.loads(file.read_text(encoding="utf-8")).items():
                ids, name = tuple(entry["ids"]), f"{key}.safetensors"
                index.setdefault(ids[0], []).append(good.get(name) or Known(ids, name, self._fault(name, len(ids))))
            self._index = index
        except FileNotFoundError:
            self._index, self._stamp = {}, ()
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            log.error("%s cannot be read, the prompts stay as they were: %s", file, error)

    def _fault(self, name: str, length: int) -> str | None:
        """What is wrong with a prompt's file, as far as its header tells."""
        ranks = self._vllm_config.parallel_config.tensor_parallel_size
        try:
            with safe_open(self._folder / name, framework="pt") as file:
                there = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - not a dict
        except (OSError, SafetensorError) as error:
            return str(error)
        for layer, spec in self._specs.items():
            number = extract_layer_index(layer)
            for part, size in (("keys", spec.head_size), ("values", spec.head_size_v)):
                shape = there.get(f"{part}.{number}", ())
                heads = max(1, shape[1] // ranks) if len(shape) == 3 else 0
                if (shape[:1], heads, shape[2:]) != ((length,), spec.num_kv_heads, (size,)):
                    return f"{part}.{number} has the shape {list(shape)}, the base wants [{length}, {spec.num_kv_heads * ranks}, {size}]"
        return None

    # ---- workers: keys and values into the cache

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        for load in self._get_connector_metadata().loads:
            if not load.over:
                for name in self._group_of:
                    self._write(name, load)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Called between the update of a layer's cache and its attention."""
        for load in self._get_connector_metadata().loads:
            if load.over:
                self._write(layer_name, load)

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        return

    def wait_for_save(self) -> None:
        return

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        failed = self._get_connector_metadata().failed if self.has_connector_metadata() else set()
        return KVConnectorTransferResults(set(), set(failed), set(failed))

    def _write(self, name: str, load: Load) -> None:
        if name not in self._group_of:
            return
        layer, group = self._layers[name], self._group_of[name]
        size = self._kv_cache_config.kv_cache_groups[group].kv_cache_spec.block_size
        positions = torch.arange(load.start, load.stop)
        blocks = torch.tensor(load.block_ids[group], dtype=torch.long)[positions // size]
        used = blocks != NULL_BLOCK
        slots = (blocks * size + positions % size)[used].to(layer.kv_cache.device)
        keys, values = (self._part(load.file, part, name)[load.start : load.stop][used] for part in ("keys", "values"))
        here = {"device": layer.kv_cache.device, "dtype": self._dtype}
        layer.impl.do_kv_cache_update(layer, keys.to(**here).contiguous(), values.to(**here).contiguous(), layer.kv_cache, slots)

    def _part(self, file: str, part: str, name: str) -> torch.Tensor:
        """[P, heads, head size]: of the heads that this worker has."""
        whole, own = self._read(file)[f"{part}.{extract_layer_index(name)}"], self._specs[name].num_kv_heads
        first = get_tensor_model_parallel_rank() * whole.shape[1] // get_tensor_model_parallel_world_size()
        return whole[:, first : first + own]

    def _read_file(self, file: str) -> dict[str, torch.Tensor]:
        return load_file(self._folder / file)


def _spec(spec: Any, name: str) -> Any:
    """A layer's own, of a group whose layers differ."""
    return getattr(spec, "kv_cache_specs", {}).get(name, spec)
