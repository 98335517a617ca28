"""A llama.cpp server that runs, as far as prompts are put into it: https://github.com/ggml-org/llama.cpp/tree/master/tools/server"""

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from softprompt.errors import ConfigError, ModelError

SECONDS = 600  # that an answer may take
OPTION = "--slot-save-path"
HERE = ("127.0.0.1", "localhost", "::1", "0.0.0.0")


@dataclass(frozen=True)
class Read:
    """What the server says to a text. `kept`: positions that it had. `likeliest`: logprobs of next tokens, by id."""

    kept: int
    likeliest: dict[int, float]


@dataclass(frozen=True)
class LlamaServer:
    """Every method raises ConfigError for what the server does not let us do, ModelError where it does not answer."""

    address: str
    key: str | None = None

    def build(self) -> str:
        """Its version."""
        return str(self._ask("/props").get("build_info") or "unknown")

    def num_slots(self) -> int:
        return int(self._ask("/props").get("total_slots") or 1)

    def model(self) -> str:
        return str(self._ask("/props").get("model_path") or "a model without a name")

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text as part of a prompt, without BOS."""
        return [int(token) for token in self._ask("/tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]]

    def read(self, slot: int, ids: Sequence[int], *, keep: bool) -> Read:
        """Reads a text into a slot. `keep`: from where what is kept there differs, else from its beginning."""
        return self._read(slot, ids, keep, {"n_predict": 0})

    def first_token(self, slot: int, ids: Sequence[int], *, keep: bool, most: int, say: int) -> Read:
        """The same, with the logprobs of the `most` likeliest next tokens. `say`: a token that is text by itself, which it is made to say:
        behind others, part of a character or an end, it shows no logprobs."""
        return self._read(slot, ids, keep, {"n_predict": 1, "n_probs": most, "logit_bias": [[say, 1e4]]})

    def _read(self, slot: int, ids: Sequence[int], keep: bool, how: dict[str, Any]) -> Read:
        said = self._ask("/completion", {"prompt": list(ids), "id_slot": slot, "cache_prompt": keep, "temperature": 0, **how})
        first = (said.get("completion_probabilities") or [{}])[0].get("top_logprobs", ())
        return Read(int(said["timings"].get("cache_n", 0)), {int(one["id"]): float(one["logprob"]) for one in first})

    def save(self, slot: int, name: str) -> int:
        """Has it write a slot into a file of its folder; how many tokens that holds."""
        return int(self._ask(f"/slots/{slot}?action=save", {"filename": name})["n_saved"])

    def restore(self, slot: int, name: str) -> int:
        """Has it read a slot from a file of its folder; how many tokens that holds."""
        return int(self._ask(f"/slots/{slot}?action=restore", {"filename": name})["n_restored"])

    def erase(self, slot: int) -> None:
        self._ask(f"/slots/{slot}?action=erase", {})

    def _ask(self, path: str, request: dict[str, Any] | None = None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        data = None if request is None else json.dumps(request).encode()
        address = self.address.rstrip("/").removesuffix("/v1")
        try:
            with urllib.request.urlopen(urllib.request.Request(address + path, data, headers), timeout=SECONDS) as answer:
                said = json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                raise ConfigError(f"{self.address}: {_reason(error)}") from None
        except (OSError, HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise ModelError(f"{self.address}: no llama.cpp server answers there: {reason}") from None
        if not isinstance(said, dict):
            raise ModelError(f"{self.address}: no llama.cpp server answers there")
        return said


def _reason(error: urllib.error.HTTPError) -> str:
    """What a server says against a request, in a sentence."""
    if error.code == 401:
        return "it asks for a key: give --api-key-file FILE"
    try:
        said = json.load(error)["error"]["message"]
    except (OSError, ValueError, KeyError, TypeError):
        said = f"it answers with {error.code}, no llama.cpp server does"
    return f"it must be started with {OPTION} DIR" if OPTION in said else said


def folder_of(address: str) -> Path | None:
    """Where a server of this machine keeps its slots, by the command line of the process that listens there; None where that is not to
    be seen."""
    target = urlsplit(address)
    if target.hostname not in HERE:
        return None
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        try:
            if OPTION in words[:-1] and any(_listens(one, target.port or 80) for one in process.net_connections("tcp")):
                return Path(process.cwd(), words[words.index(OPTION) + 1])
        except psutil.Error:
            continue
    return None


def _listens(connection: Any, port: int) -> bool:
    return connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
