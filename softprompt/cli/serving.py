"""Prompts behind HTTP."""

import ipaddress
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from softprompt.cli import completion
from softprompt.cli.options import EngineHere, OtherBase, app, base_by
from softprompt.errors import ConfigError
from softprompt.extras import need

if TYPE_CHECKING:
    from softprompt.config import ModelConfig
    from softprompt.serve.asking import Engine

MEBIBYTE = 1 << 20
OVERRIDE = re.compile(r"model\.\w+=")
NAMED = re.compile(r"(\w[\w.-]*)=(.+)")

Prompts = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[PROMPT | NAME=PROMPT ...] [model.key=value ...]",
        help="Prompt or run folders, on one base; asked for by the names of their folders, or by NAME.",
        autocompletion=completion.base_settings,
    ),
]
Folder = Annotated[Path | None, typer.Option(metavar="DIR", help="Serve what is in this folder too, as it comes and goes.")]
Host = Annotated[str, typer.Option(help="Address to listen at; another than this machine's own needs --api-key-file.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 is any that is free.")]
ApiKeys = Annotated[Path | None, typer.Option("--api-key-file", metavar="FILE", help="Keys that requests must have one of, one a line.")]
AdminKeys = Annotated[
    Path | None, typer.Option("--admin-key-file", metavar="FILE", help="Keys for /v1/prompts: to list, upload and delete prompts.")
]
Ensembles = Annotated[
    list[str] | None,
    typer.Option("--ensemble", metavar="NAME=A+B", help="Prompts that answer together by the mean, or NAME=vote:A+B; repeatable."),
]
Origins = Annotated[list[str] | None, typer.Option("--cors-origin", metavar="URL", help="Let pages of this origin ask; repeatable.")]
Memory = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="MB",
        help="What is kept of prompts and texts that nobody asks now, at most; 1024. llama.cpp: all it keeps.",
    ),
]
Waiting = Annotated[int | None, typer.Option(min=1, help="Answers that are made or wait, at most; more are told to come again; 256.")]
Kind = Annotated[
    str,
    typer.Option(
        "--engine",
        metavar="ENGINE",
        help="own; llama, for a GGUF file as it is; vllm, or vllm=URL of one with our connector.",
    ),
]
VllmPython = Annotated[Path | None, typer.Option(metavar="FILE", help="The interpreter that has vLLM, where it is another than this.")]
VllmFolder = Annotated[Path | None, typer.Option(metavar="DIR", help="Where vLLM finds keys and values, and its log goes.")]
Body = Annotated[int, typer.Option(min=1, metavar="MB", help="Size of a request at most.")]
Upload = Annotated[int, typer.Option(min=1, metavar="MB", help="Size of an uploaded prompt at most, unpacked.")]
Answers = Annotated[int, typer.Option(min=1, help="Answers of a request at most: its texts times n.")]
Seconds = Annotated[float, typer.Option(min=0.1, help="Time of a request at most.")]
Drain = Annotated[float, typer.Option(min=0, help="Time to finish what has begun, after SIGTERM.")]
LogTexts = Annotated[bool, typer.Option("--log-texts", help="Write requests and answers into the log.")]


@app.command()
def serve(
    prompts: Prompts = None,
    folder: Folder = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_keys: ApiKeys = None,
    admin_keys: AdminKeys = None,
    ensembles: Ensembles = None,
    cors_origins: Origins = None,
    memory: Memory = None,
    max_waiting: Waiting = None,
    max_answers: Answers = 128,
    max_body: Body = 1,
    max_upload: Upload = 64,
    seconds: Seconds = 600.0,
    drain_seconds: Drain = 30.0,
    log_texts: LogTexts = False,
    allow_other_base: OtherBase = False,
    engine: Kind = "own",
    vllm_python: VllmPython = None,
    vllm_folder: VllmFolder = None,
) -> None:
    """Serve prompts and their base behind the HTTP interface that OpenAI's clients speak."""
    _check_installed()
    from softprompt.serve.guard import AT_HOME, Keys
    from softprompt.serve.log import log_as_json
    from softprompt.serve.running import listen, run
    from softprompt.serve.service import Settings

    keys, admins = (None if file is None else Keys.read(file) for file in (api_keys, admin_keys))
    if keys is None and not _at_home(host):
        raise ConfigError(f"--host {host} can be reached from elsewhere: give --api-key-file FILE, or leave --host out")
    hosts = frozenset((*AT_HOME, host)) if keys is None else None
    sizes = {"most_bytes": max_body * MEBIBYTE, "most_upload": max_upload * MEBIBYTE, "most_answers": max_answers}
    settings = Settings(keys, admins, hosts, tuple(cors_origins or ()), folder, **sizes, seconds=seconds, log_texts=log_texts)
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--folder {folder}: there is no such folder")
    own = _Own(dict(map(_ensemble, ensembles or ())), memory, max_waiting, allow_other_base)
    vllm = _Vllm.of(engine, vllm_python, vllm_folder, own)
    served = _Served.of(prompts or [], folder)
    with listen(host, port) as listening, tempfile.TemporaryDirectory() as spare:
        log_as_json()
        run(served.by_own(own, engine) if vllm is None else served.by_vllm(vllm, Path(spare)), settings, listening, drain_seconds)


def _check_installed() -> None:
    """Raises MissingPackage."""
    for package in ("fastapi", "uvicorn", "openai", "prometheus_client", "llguidance"):
        need(package, "softprompt serve")


def _at_home(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _named(given: list[str]) -> dict[str, Path]:
    """The prompt folders by the names that they are served by. Raises ConfigError where two have the same."""
    from softprompt.artifact import find_prompt, find_prompts

    found: dict[str, Path] = {}
    for item in given:
        named = NAMED.fullmatch(item)
        own = named is not None and not Path(item).exists()
        places = [find_prompt(named[2])] if named is not None and own else find_prompts(item)
        for place in places:
            name = named[1] if named is not None and own else _name(place)
            if name in found:
                raise ConfigError(f"{found[name]} and {place} would both be served as {name}: give one another name, NAME={place}")
            found[name] = place
    return found


def _name(place: Path) -> str:
    """Of a run's prompt, the run's; else the folder's."""
    whole = place.resolve()
    return whole.parent.name if whole.name == "prompt" else whole.name


def _ensemble(given: str) -> tuple[str, tuple[tuple[str, ...], str]]:
    """(its name, (its prompts, how they agree)). Raises ConfigError."""
    named = NAMED.fullmatch(given)
    vote = named is not None and named[2].startswith("vote:")
    names = tuple(named[2].removeprefix("vote:").split("+")) if named is not None else ()
    if named is None or len(names) < 2 or not all(names):
        raise ConfigError(f"--ensemble {given}: write NAME=A+B, or NAME=vote:A+B, with the names of prompts")
    return named[1], (names, "vote" if vote else "mean")


# ---- engines -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Own:
    """What the command says of an engine in this process; the defaults of what is None are `own.start`'s and `load_gguf`'s."""

    ensembles: dict[str, tuple[tuple[str, ...], str]]
    memory: int | None
    max_waiting: int | None
    allow_other_base: bool


@dataclass(frozen=True)
class _Vllm:
    address: str | None
    python: Path | None
    folder: Path | None

    @classmethod
    def of(cls, engine: str, python: Path | None, folder: Path | None, own: _Own) -> "_Vllm | None":
        """None for those in this process. Raises ConfigError for options that belong to the other one."""
        kind, _, address = engine.partition("=")
        if engine in list(EngineHere):
            if python or folder:
                raise ConfigError("--vllm-python and --vllm-folder go with --engine vllm")
            return None
        if kind != "vllm" or engine == "vllm=":
            raise ConfigError(f"--engine {engine}: there are own, llama, vllm and vllm=URL")
        if own != _Own({}, None, None, False):
            raise ConfigError("--ensemble, --memory, --max-waiting and --allow-other-base are for the engines own and llama")
        if address and (python or folder is None):
            raise ConfigError("a vLLM server that runs already has its own python, and needs --vllm-folder, the folder of its connector")
        return cls(address or None, python, folder)


@dataclass(frozen=True)
class _Served:
    """A base, and prompts by name."""

    model: "ModelConfig"
    prompts: dict[str, Path]

    @classmethod
    def of(cls, words: list[str], folder: Path | None) -> "_Served":
        """The prompts that are named, and their base, or that of what lies in `folder`. Raises ConfigError where there is neither."""
        from softprompt.cli.prompts import base_config
        from softprompt.config import load_config
        from softprompt.serve.folder import prompts_in

        overrides = [word for word in words if OVERRIDE.match(word)]
        given = _named([word for word in words if word not in overrides])
        lying = {} if folder is None else prompts_in(folder)
        first = next(iter([*given.values(), *(place for place, _ in lying.values())]), None)
        model = load_config(None, overrides).model if first is None else base_config(first, overrides)
        if not (model.name or model.gguf_file):
            raise ConfigError("nothing to serve: name a prompt, or a base by model.name=NAME")
        return cls(model, given)

    async def by_own(self, own: _Own, engine: str) -> "Engine":
        from softprompt.serve.own import start

        memory = own.memory and own.memory * MEBIBYTE
        base = base_by(EngineHere(engine), self.model, memory_bytes=memory)
        sizes = {"memory_bytes": memory, "most_waiting": own.max_waiting}
        said: dict[str, Any] = {name: value for name, value in sizes.items() if value is not None}
        together: Any = own.ensembles
        return start(base, self.prompts, ensembles=together, allow_other_base=own.allow_other_base, **said)

    async def by_vllm(self, vllm: _Vllm, spare: Path) -> "Engine":
        from softprompt.serve.vllm import start

        name, gguf_file = self.model.location
        place = Path(gguf_file or name)
        called = place.stem if place.is_file() else place.name if place.exists() else name
        return await start(called, self.model, self.prompts, vllm.folder or spare, address=vllm.address, python=vllm.python)
