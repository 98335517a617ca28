"""Keys and values in llama.cpp's slots: a server that was given them answers as we do, and what would answer otherwise is refused."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from other_engines import LlamaServer, from_slot, our_answers, relayed, some_prompt, tiny_gguf
from test_cli import refused, run  # noqa: F401 - fixtures

from softprompt import load_prompt
from softprompt.engine.model import FrozenBase
from softprompt.errors import ArtifactError, ConfigError, Error, ModelError
from softprompt.export import Target, Wanted, attach, export
from softprompt.export.llama_server import LlamaServer as LlamaClient
from softprompt.export.llama_server import folder_of
from softprompt.export.slots import read_slot

QUESTIONS = ("bring tea", "why 7 coffees", "no milk", "drink a cup of it", "bring bring bring")
TOKENS = 8


@dataclass(frozen=True)
class Scene:
    """A base, the same as a GGUF file, and prompts: rows and deep ones in turn, of several lengths."""

    base: FrozenBase
    file: Path
    prompts: dict[str, Path]

    def check(self, address: str, facts: dict[str, Any], name: str, slot: int = 0) -> None:
        """The server's answers from a slot are ours; what it has for characters that are not whole is its own."""
        stored = load_prompt(self.prompts[name], self.base)
        ours = our_answers(self.base, self.prompts[name], list(QUESTIONS), TOKENS)
        for question, wanted in zip(QUESTIONS, ours, strict=True):
            said = from_slot(address, facts[name], stored.encoder.question(question), TOKENS, slot)
            assert said["timings"]["cache_n"] >= len(facts[name]["ids"])
            assert said["content"] == wanted.replace("\ufffd", "") or "\ufffd" in wanted
        assert len({*ours}) > 1


@pytest.fixture(scope="module")
def scene(bases: Callable[..., FrozenBase], tmp_path_factory: pytest.TempPathFactory) -> Scene:
    folder, base = tmp_path_factory.mktemp("slots"), bases(vocab_size=259)
    lengths = {"rows": 8, "deep": 9, "behind": 30, "long": 200}
    places = {"behind": "after_bos"}
    made = {
        name: some_prompt(folder / name, base, seed, length=length, position=places.get(name, "start"), deep=name != "rows")
        for seed, (name, length) in enumerate(lengths.items())
    }
    return Scene(base, tiny_gguf(folder / "base.gguf", base), made)


@pytest.fixture
def server(scene: Scene, tmp_path: Path) -> LlamaServer:
    (tmp_path / "slots").mkdir()
    return LlamaServer(scene.file, tmp_path / "slots")


def attached(scene: Scene, address: str, folder: Path, *names: str) -> dict[str, Any]:
    return attach(Target(address, folder), [scene.prompts[name] for name in names or scene.prompts])


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_a_server_answers_from_its_slots_as_we_do(scene: Scene, tmp_path: Path, kind: str) -> None:
    server = LlamaServer(scene.file, tmp_path, kind)
    result = attached(scene, server.address, tmp_path)
    assert (result["cache_type_k"], result["cache_type_v"]) == (kind.lower(), kind.lower())
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(f"{name}.bin" for name in scene.prompts)
    for facts in result["prompts"].values():
        assert max(facts["checked"].values()) < (0.01 if kind == "F32" else 0.05)
    if kind == "F32":
        for name in scene.prompts:
            scene.check(server.address, result["prompts"], name)


@pytest.mark.parametrize("unified", [True, False])
def test_one_file_serves_any_slot(scene: Scene, tmp_path: Path, unified: bool) -> None:
    server = LlamaServer(scene.file, tmp_path, room=2048, n_parallel=4, kv_unified=unified)
    result = attached(scene, server.address, tmp_path)
    assert [facts["request"]["id_slot"] for facts in result["prompts"].values()] == [0, 1, 2, 3]
    for slot, name in enumerate(reversed(scene.prompts)):
        scene.check(server.address, result["prompts"], name, slot)


def test_the_request_that_is_shown_is_the_one_that_works(scene: Scene, server: LlamaServer, tmp_path: Path) -> None:
    """Its text is tokenized by the server, behind the ids."""
    result = attached(scene, server.address, tmp_path / "slots", "deep")
    facts = result["prompts"]["deep"]
    text = facts["request"]["prompt"][-1]
    assert text == "Human: Where is my parcel?\n\nAssistant: "
    stored = load_prompt(scene.prompts["deep"], scene.base)
    by_text = from_slot(server.address, facts, [text], TOKENS)
    by_ids = from_slot(server.address, facts, stored.encoder.question("Where is my parcel?"), TOKENS)
    assert by_text["content"] == by_ids["content"]
    assert by_text["timings"]["cache_n"] == len(facts["ids"])


def test_exported_slots_are_restored_by_another_server(scene: Scene, tmp_path: Path) -> None:
    written = export(Wanted(list(scene.prompts.values()), "slots", tmp_path / "out", gguf_file=scene.file, cache_type="f32"))
    facts = json.loads((tmp_path / "out" / "softprompt.json").read_text())
    assert {**facts, "out": written["out"]} == {**written, "softprompt": facts["softprompt"]}
    assert (facts["cache_type_k"], facts["cache_type_v"]) == ("f32", "f32")
    assert facts["build"].startswith("xllamacpp 20")
    assert facts["files"] == sorted(f"{name}.bin" for name in scene.prompts)
    server = LlamaServer(scene.file, tmp_path / "out")
    for name in scene.prompts:
        scene.check(server.address, facts["prompts"], name)


def test_what_was_answered_without_the_prompt_is_not_taken_up_again(scene: Scene, server: LlamaServer, tmp_path: Path) -> None:
    """The server keeps what it has computed of the ids as tokens, and takes the likest of all that it keeps."""
    facts = attached(scene, server.address, tmp_path / "slots", "deep")["prompts"]
    stored, wrong = load_prompt(scene.prompts["deep"], scene.base), 0
    for question in QUESTIONS:
        LlamaClient(server.address).erase(0)
        asked = [*facts["deep"]["ids"], *stored.encoder.question(question)]
        wrong += LlamaClient(server.address).read(0, asked, keep=True).kept < len(facts["deep"]["ids"])
    assert wrong
    scene.check(server.address, facts, "deep")


def test_a_retrained_prompt_has_other_ids(scene: Scene, server: LlamaServer, tmp_path: Path) -> None:
    first = attached(scene, server.address, tmp_path / "slots", "deep")["prompts"]["deep"]
    again = some_prompt(tmp_path / "deep", scene.base, 77, length=9, position="start", deep=True)
    changed = Scene(scene.base, scene.file, {"deep": again})
    second = attached(changed, server.address, tmp_path / "slots")["prompts"]
    assert first["file"] == second["deep"]["file"]
    assert first["ids"] != second["deep"]["ids"]
    changed.check(server.address, second, "deep")
    assert attached(scene, server.address, tmp_path / "slots", "deep")["prompts"]["deep"]["ids"] == first["ids"]


# ---- what is refused -------------------------------------------------------------------------------------------------


def left_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def why_not(error: type[Error], scene: Scene, address: str, folder: Path | None, **how: Any) -> str:
    """The one line that an attempt to attach ends with; nothing is left in the folder."""
    with pytest.raises(error) as raised:
        attach(Target(address, folder, **how), [scene.prompts["deep"]])
    assert "\n" not in str(raised.value)
    assert folder is None or not folder.is_dir() or left_in(folder) == []
    return str(raised.value)


def test_a_server_that_goes_away_halfway(scene: Scene, server: LlamaServer, tmp_path: Path) -> None:
    """At every request in turn: one sentence, and no file is left."""
    asked: list[str] = []
    (tmp_path / "first").mkdir()
    first = LlamaServer(scene.file, tmp_path / "first")
    with relayed(first.address, after=asked.append) as address:
        attached(scene, address, tmp_path / "first", "deep")
    assert len(asked) > 10
    for number in range(len(asked)):
        with relayed(server.address, ends_after=number) as address:
            said = why_not(ModelError, scene, address, tmp_path / "slots")
        assert said.startswith(f"{address}: no llama.cpp server answers there: ")


def test_a_server_that_does_not_take_slots_up_again(scene: Scene, server: LlamaServer, tmp_path: Path) -> None:
    def from_the_beginning(path: str, request: dict[str, Any]) -> None:
        request["cache_prompt"] = False

    with relayed(server.address, before=from_the_beginning) as address:
        said = why_not(ConfigError, scene, address, tmp_path / "slots")
    assert "it took up 0 of the prompt's 10 positions and computed the rest from ids that are only a name: no slot can be restored" in said


def test_a_server_that_reads_other_numbers(scene: Scene, server: LlamaServer, tmp_path: Path) -> None:
    def otherwise(path: str, request: dict[str, Any]) -> None:
        if "restore" in path:
            file = tmp_path / "slots" / request["filename"]
            data = file.read_bytes()
            file.write_bytes(data[:-512] + (-np.frombuffer(data[-512:], np.float32)).tobytes())

    with relayed(server.address, before=otherwise) as address:
        assert "behind deep its first tokens differ from ours by" in why_not(ArtifactError, scene, address, tmp_path / "slots")


def test_a_build_that_writes_slots_in_another_way(scene: Scene, server: LlamaServer, tmp_path: Path) -> None:
    def otherwise(path: str) -> None:
        for file in (tmp_path / "slots").iterdir() if "save" in path else ():
            data = file.read_bytes()
            file.write_bytes(data[:100] + b"  " + data[100:])

    with relayed(server.address, after=otherwise) as address:
        said = why_not(ArtifactError, scene, address, tmp_path / "slots")
    assert "of the slot that it wrote: nothing in it has a form that is known: another build of llama.cpp is needed" in said


def test_another_base_is_told_by_its_keys_and_values(scene: Scene, bases: Callable[..., FrozenBase], tmp_path: Path) -> None:
    other = bases(vocab_size=259, seed=5)
    (tmp_path / "slots").mkdir()
    server = LlamaServer(tiny_gguf(tmp_path / "other.gguf", other), tmp_path / "slots")
    said = why_not(ArtifactError, scene, server.address, tmp_path / "slots")
    assert "the keys and values of plain tokens are 1." in said
    assert "other.gguf" in said
    deeper = bases(vocab_size=259, num_hidden_layers=3)
    server = LlamaServer(tiny_gguf(tmp_path / "deeper.gguf", deeper), tmp_path / "slots")
    assert "of their size away from those of the prompts' base" in why_not(ArtifactError, scene, server.address, tmp_path / "slots")
    wider = bases(vocab_size=259, num_key_value_heads=4)
    server = LlamaServer(tiny_gguf(tmp_path / "wider.gguf", wider), tmp_path / "slots")
    assert "its rows have another size" in why_not(ArtifactError, scene, server.address, tmp_path / "slots")


def test_settings_that_stand_in_the_way_are_named(scene: Scene, server: LlamaServer, tmp_path: Path) -> None:
    none = LlamaServer(scene.file)
    (tmp_path / "elsewhere").mkdir()
    said = why_not(ConfigError, scene, none.address, tmp_path / "elsewhere")
    assert said == f"{none.address}: it must be started with --slot-save-path DIR"
    said = why_not(ConfigError, scene, server.address, tmp_path / "elsewhere")
    assert "is not where the server keeps its slots, it has put deep.draft.bin elsewhere: give the folder of its --slot-save-path" in said
    (tmp_path / "slots" / "deep.draft.bin").unlink()
    assert why_not(ConfigError, scene, server.address, tmp_path / "nowhere") == f"--slots {tmp_path / 'nowhere'}: no such folder"
    assert "give --slots DIR, the folder of its --slot-save-path" in why_not(ConfigError, scene, server.address, None)
    keyed = LlamaServer(scene.file, tmp_path / "slots", api_keys=["secret"])
    assert "it asks for a key: give --api-key-file FILE" in why_not(ConfigError, scene, keyed.address, tmp_path / "slots")
    assert attach(Target(keyed.address, tmp_path / "slots", "secret"), [scene.prompts["deep"]])["prompts"]
    assert "no llama.cpp server answers there" in why_not(ModelError, scene, "http://127.0.0.1:9", tmp_path / "elsewhere")


def test_values_that_lie_across_are_refused(scene: Scene, tmp_path: Path) -> None:
    import xllamacpp

    off = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = LlamaServer(scene.file, tmp_path, flash_attn_type=off)
    assert "start the server with --flash-attn on" in why_not(ArtifactError, scene, server.address, tmp_path)


def test_an_export_that_cannot_be_leaves_nothing(scene: Scene, bases: Callable[..., FrozenBase], tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(scene.file.read_bytes()[:-5000])
    other = tiny_gguf(tmp_path / "other.gguf", bases(vocab_size=259, seed=5))
    wanted: list[tuple[dict[str, Any], str]] = [
        ({"gguf_file": cut}, "cut.gguf: xllamacpp 20"),
        ({"gguf_file": other}, "the keys and values of plain tokens are 1."),
        ({"gguf_file": scene.file, "cache_type": "iq4_nl"}, "--cache-type iq4_nl: known are f16, f32"),
        ({}, "give the same base as one with --gguf FILE"),
    ]
    for how, sentence in wanted:
        with pytest.raises(Error) as raised:
            export(Wanted([scene.prompts["deep"]], "slots", tmp_path / "out", **how))
        assert sentence in str(raised.value)
        assert "\n" not in str(raised.value)
        assert left_in(tmp_path) == ["cut.gguf", "other.gguf"]
    with pytest.raises(ConfigError, match="--cache-type belongs to --to slots, not to --to npy"):
        export(Wanted([scene.prompts["rows"]], "npy", tmp_path / "out", cache_type="f16"))


# ---- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
def test_layers_and_forms_are_found_whatever_their_order(kind: str) -> None:
    """Two caches, layers out of order, positions out of order, of one cache a window only, other streams that are empty."""
    generator, sizes = torch.Generator().manual_seed(0), GGMLQuantizationType[kind]
    plain = {f"{part}.{layer}": torch.randn(20, 2, 64, generator=generator) for layer in range(4) for part in ("keys", "values")}
    caches = (((3, 1), tuple(reversed(range(20)))), ((0, 2), tuple(range(9, 20))))
    turned = hadamard(64) if kind == "Q8_0" else np.eye(64)
    neighbours = np.arange(64).reshape(2, 32).T.reshape(-1)

    def written(tensors: dict[str, torch.Tensor], first: int = 900) -> bytes:
        data = np.array([0x67677371, 9, 20, *range(first, first + 20)], np.uint32).tobytes()
        for layers, positions in caches:
            cells = [word for position in positions for word in (position, 1, 2)]
            data += np.array([3, 0, len(positions), *cells, 0, len(layers), 5], np.uint32).tobytes()
            for part in ("keys", "values"):
                for layer in layers:
                    numbers = tensors[f"{part}.{layer}"].numpy()[list(positions)]
                    numbers = numbers[..., neighbours] if part == "keys" else numbers
                    rows = quantize((numbers @ turned).astype(np.float32).reshape(len(positions), -1), sizes)
                    data += np.int32(sizes).tobytes() + np.uint64(rows.nbytes // len(rows)).tobytes() + rows.tobytes()
            data += bytes(4)
        return data

    slot = read_slot(written(plain), range(900, 920), plain)
    assert [layer.number for layer in slot.layers] == [3, 1, 0, 2]
    assert slot.error < {"F16": 1e-3, "Q8_0": 0.01, "Q4_0": 0.12}[kind]
    assert slot.cache_types == {"cache_type_k": kind.lower(), "cache_type_v": kind.lower()}
    other = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in plain.items()}
    theirs, ours = (np.frombuffer(data, np.uint8).astype(int) for data in (written(other, 700), slot.holding(other, range(700, 720))))
    assert len(theirs) == len(ours)
    assert (abs(theirs - ours) > 1).mean() < 0.01  # a number between two roundings
    with pytest.raises(ArtifactError, match="of their size away from those of the prompts' base"):
        read_slot(written(other), range(900, 920), plain)
    with pytest.raises(ArtifactError, match="start the server with --swa-full"):
        read_slot(written(plain) + written(plain, 700), range(900, 920), plain)
    for data in (written(plain)[:-300], written(plain)[:100], b"GGUF" * 1000, written(plain, 901)):
        with pytest.raises(ArtifactError, match=r"layers|form that is known"):
            read_slot(data, range(900, 920), plain)


def hadamard(size: int) -> Any:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron(np.array([[1, 1], [1, -1]]), matrix)
    return matrix / np.sqrt(size)


# ---- the command -----------------------------------------------------------------------------------------------------

SERVES = """
import sys, xllamacpp
settings = xllamacpp.CommonParams()
settings.model.path, settings.slot_save_path = {file!r}, "slots/"
settings.n_ctx, settings.n_parallel, settings.port, settings.warmup, settings.verbosity = 512, 1, 0, False, 0
server = xllamacpp.Server(settings)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


def test_the_folder_is_seen_in_the_servers_command_line(scene: Scene, run: Any, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "slots").mkdir()
    command = [sys.executable, "-c", SERVES.format(file=str(scene.file)), "--slot-save-path", "slots"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=os.environ) as server:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        assert folder_of(address) == tmp_path / "slots"
        assert folder_of("http://127.0.0.1:9") is None
        words = ("attach", address, scene.prompts["deep"], scene.prompts["rows"], "--json", tmp_path / "attached.json")
        code_of_exit, shown, error = run(*words)
        file = tmp_path / "slots" / "deep.bin"
        file.write_bytes(file.read_bytes()[:-100])  # which llama.cpp ends at, or refuses
        with pytest.raises(Exception, match=r"Unable to restore slot|closed connection|Connection reset"):
            from_slot(address, {"ids": [], "restore": {"filename": file.name}, "request": {}}, [3], 1)
        server.communicate("")
    assert (code_of_exit, error) == (0, "")
    result = json.loads((tmp_path / "attached.json").read_text())
    assert set(result) == {"server", "slots", "base", "build", "cache_type_k", "cache_type_v", "prompts"}
    lines = [line for line in shown.splitlines() if line.startswith("curl ")]
    assert len(lines) == 4
    assert f"/slots/0?action=restore' -d '{json.dumps(result['prompts']['deep']['restore'])}'" in lines[0]
    assert str(result["prompts"]["deep"]["ids"])[1:-1] in lines[1]


def test_a_prompt_is_named(refused: Any) -> None:  # noqa: F811
    assert "name a prompt or run folder" in refused("attach", "http://127.0.0.1:9", "model.device=cpu")
