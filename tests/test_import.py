"""Prompts that other programs wrote: PEFT's own adapters keep PEFT's logits, and what cannot be taken is refused in a sentence."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_cli import refused, run  # noqa: F401 - fixtures
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from softprompt.artifact import load_prompt, read_card
from softprompt.engine.model import FrozenBase
from softprompt.foreign import import_prompt
from softprompt.generation import generate
from softprompt.peft_here import fault_of_generate
from softprompt.sampling import Sampling

TASKS = 3
LENGTH = 5
HEADS, SIZE = 2, 8  # of the tiny llama's keys
KINDS = {
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, encoder_hidden_size=16),
    "multitask": lambda: peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, num_tasks=TASKS, num_ranks=2),
    "prefix": lambda: peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, token_dim=HEADS * SIZE, num_attention_heads=HEADS
    ),
    "projected prefix": lambda: peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, token_dim=HEADS * SIZE, num_attention_heads=HEADS, prefix_projection=True,
        encoder_hidden_size=HEADS * SIZE,
    ),
}  # fmt: skip
PLAIN_ROWS = torch.randn(LENGTH, 32, generator=torch.Generator().manual_seed(3))


def trained_by_peft(base: FrozenBase, kind: str, folder: Path) -> Path:
    """An adapter that PEFT itself trained for a few steps and saved."""
    torch.manual_seed(1)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base.name), KINDS[kind]())
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=0.05)
    ids = torch.tensor([base.tokenizer("bring tea, bring milk")["input_ids"]])
    tasks = {"task_ids": torch.tensor([1])} if kind == "multitask" else {}
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, **tasks).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(folder)
    return folder


def logits_of_peft(base: FrozenBase, adapter: Path, texts: list[str], task_id: int | None) -> list[torch.Tensor]:
    """PEFT's logits of the texts' last tokens, in one batch padded on the right; texts with the BOS that the tokenizer adds."""
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.name), adapter).eval()
    ids = [base.tokenizer(text)["input_ids"] for text in texts]
    longest = max(map(len, ids))
    padded = torch.tensor([row + [tiny.PAD] * (longest - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    tasks = {} if task_id is None else {"task_ids": torch.full((len(ids),), task_id)}
    with torch.no_grad():
        logits = model(input_ids=padded, attention_mask=mask, **tasks).logits
    return [row[-longest + len(own) - 1] for row, own in zip(logits, ids, strict=True)]


def our_logits(base: FrozenBase, folder: Path, texts: list[str]) -> list[torch.Tensor]:
    """The same of the imported prompt, in a batch padded on the right."""
    prompt = load_prompt(folder, base)
    ids = [prompt.encoder.question(text) for text in texts]
    longest = max(map(len, ids))
    padded = torch.tensor([[*row, *[tiny.PAD] * (longest - len(row))] for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    with torch.no_grad():
        states = base.continue_from(prompt.soft.prefix(base), torch.zeros(len(ids), dtype=torch.long), padded, mask)
        return [base.logits(states.hidden_BTH[row, len(own) - 1]) for row, own in enumerate(ids)]


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_trained_by_peft_keeps_its_logits(bases, tmp_path, kind, adds_bos):
    base = bases(adds_bos=adds_bos)
    adapter = trained_by_peft(base, kind, tmp_path / "adapter")
    task = 1 if kind == "multitask" else None
    card, _ = import_prompt(adapter, tmp_path / "prompt", ["model.device=cpu"], task)
    assert (card.base.name, card.position, card.bos_id) == (base.name, "start", tiny.BOS if adds_bos else None)
    texts = ["bring tea", "please bring 咖啡 now"]
    theirs = logits_of_peft(base, adapter, texts, task)
    alone = [logits_of_peft(base, adapter, [text], task)[0] for text in texts]
    plain = [base.model(torch.tensor([base.tokenizer(text)["input_ids"]])).logits[0, -1].detach() for text in texts]
    for ours, expected, single, bare in zip(our_logits(base, tmp_path / "prompt", texts), theirs, alone, plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(ours, single, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(ours, bare, rtol=1e-2, atol=1e-2)  # the prompt does something
    assert generate(base, load_prompt(tmp_path / "prompt", base), texts, Sampling(max_new_tokens=4))


@pytest.mark.parametrize("family", ["gemma3_text", "bloom", "granite", "gpt2"])
def test_families_that_treat_embeddings_in_their_own_way_keep_their_logits(bases, tmp_path, family):
    base = bases(family)
    adapter = trained_by_peft(base, "prompt", tmp_path / "adapter")
    import_prompt(adapter, tmp_path / "prompt", ["model.device=cpu"])
    texts = ["bring tea"]
    torch.testing.assert_close(
        our_logits(base, tmp_path / "prompt", texts), logits_of_peft(base, adapter, texts, None), rtol=1e-3, atol=1e-4
    )


def test_the_imported_folder_is_an_adapter_of_peft_again(bases, tmp_path):
    base = bases()
    adapter = trained_by_peft(base, "multitask", tmp_path / "adapter")
    import_prompt(adapter, tmp_path / "prompt", ["model.device=cpu"], 2)
    expected = logits_of_peft(base, adapter, ["bring tea"], 2)
    torch.testing.assert_close(logits_of_peft(base, tmp_path / "prompt", ["bring tea"], None), expected, rtol=1e-4, atol=1e-5)


def test_the_tasks_of_an_adapter_differ(bases, tmp_path):
    base = bases()
    adapter = trained_by_peft(base, "multitask", tmp_path / "adapter")
    for task in range(TASKS):
        import_prompt(adapter, tmp_path / f"task-{task}", ["model.device=cpu"], task)
    rows = [load_prompt(tmp_path / f"task-{task}", base).soft.rows_PH for task in range(TASKS)]
    assert not torch.allclose(rows[0], rows[1])
    assert not torch.allclose(rows[1], rows[2])


def write_plain(place: Path, rows: torch.Tensor = PLAIN_ROWS) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.suffix == ".npy":
        np.save(place, rows.numpy())
    else:
        save_file({"decoder": rows}, place)
    return place


@pytest.mark.parametrize("name", ["rows.npy", "rows.safetensors", "prompt_prefixes/my-task/decoder.safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_rows_alone_are_taken_in(bases, run, tmp_path, name, dtype):  # noqa: F811
    file = write_plain(tmp_path / name, PLAIN_ROWS.to(dtype))
    source = file.parent if "prefixes" in name else file
    report = tmp_path / "report.json"
    words = (
        "--out",
        tmp_path / "prompt",
        "--json",
        report,
        f"model.name={bases().name}",
        "model.device=cpu",
        "--template",
        "human-assistant",
    )
    code, shown, error = run("import", source, *words)
    assert (code, error) == (0, "")
    assert json.loads(report.read_text()) == {
        "prompt": str(tmp_path / "prompt"), "kind": "rows alone", "num_virtual_tokens": LENGTH, "method": "prompt", "position": "start",
        "template": "human-assistant", "base": bases().name, "notes": [fault] if (fault := fault_of_generate()) else [],
    }  # fmt: skip
    assert f"{LENGTH} virtual tokens" in shown
    assert torch.equal(load_prompt(tmp_path / "prompt", bases()).soft.rows_PH, PLAIN_ROWS.to(dtype).float())


def test_the_card_takes_what_it_is_told(bases, tmp_path):
    file = write_plain(tmp_path / "rows.npy")
    words = ['data.label_words={"0" = "no", "1" = "yes"}', "data.max_length=99", "prompt.text=Say yes.", "prompt.position=after_bos"]
    import_prompt(file, tmp_path / "prompt", [f"model.name={bases().name}", "model.device=cpu", *words])
    card = read_card(tmp_path / "prompt")
    assert (card.data.labels, card.max_length, card.text, card.position) == (("no", "yes"), 99, "Say yes.", "after_bos")
    assert load_file(tmp_path / "prompt" / "adapter_model.safetensors")["prompt_embeddings"].shape == (LENGTH + 1, 32)
    readme = (tmp_path / "prompt" / "README.md").read_text()
    assert "imported from rows.npy (rows alone).\nWhat it was trained on is not known.\n" in readme
    assert str(tmp_path) not in readme


def test_an_imported_prompt_evaluates_and_is_a_start_for_training(bases, run, make_config, tmp_path):  # noqa: F811
    adapter = trained_by_peft(bases(), "p-tuning", tmp_path / "adapter")
    import_prompt(adapter, tmp_path / "prompt", ["model.device=cpu"])
    (tmp_path / "config.toml").write_text(make_config("train.steps=2", f"prompt.file={tmp_path / 'prompt'}", "prompt.init=file").to_toml())
    assert run("eval", tmp_path / "prompt", "--data", tmp_path / "eval.jsonl", "model.device=cpu", "--out", tmp_path / "results")[0] == 0
    assert run("train", tmp_path / "config.toml")[0] == 0
    assert "from the 5 rows of" in read_card(tmp_path / "run").init


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.fixture
def import_fails(refused, bases, tmp_path):  # noqa: F811
    """import_fails(source, ...) -> the one line that says why; nothing is left at --out."""

    def call(source: Path, *words: str, base: bool = True) -> str:
        given = [f"model.name={bases().name}", "model.device=cpu"] if base else []
        error = refused("import", source, "--out", tmp_path / "prompt", *given, *words)
        assert not (tmp_path / "prompt").exists()
        assert not list(tmp_path.glob(".*draft"))
        return error

    return call


def nan_rows() -> torch.Tensor:
    rows = PLAIN_ROWS.clone()
    rows[2, 3] = math.nan
    return rows


ROWS = {
    "another width": (PLAIN_ROWS[:, :16].contiguous(), "rows of 16 numbers"),
    "NaN": (nan_rows(), "not finite"),
    "too large for float32": (PLAIN_ROWS.double() * 1e300, "not finite"),
    "whole numbers": (PLAIN_ROWS.long(), "of real numbers"),
    "three dimensions": (PLAIN_ROWS[None], "a soft prompt is [virtual tokens, hidden size]"),
    "no rows": (PLAIN_ROWS[:0], "a soft prompt is [virtual tokens, hidden size]"),
}


@pytest.mark.parametrize("name", ["rows.npy", "rows.safetensors"])
@pytest.mark.parametrize("kind", ROWS)
def test_rows_that_are_no_prompt_of_the_base_are_refused(import_fails, tmp_path, kind, name):
    rows, reason = ROWS[kind]
    assert reason in import_fails(write_plain(tmp_path / name, rows))


@pytest.mark.parametrize("content", [b"", b"\x80\x04 not what it says", None])
@pytest.mark.parametrize("name", ["rows.npy", "rows.safetensors"])
def test_damaged_files_are_refused(import_fails, tmp_path, name, content):
    file = write_plain(tmp_path / name)
    file.write_bytes(file.read_bytes()[:-9] if content is None else content)
    assert "is damaged" in import_fails(file)


def test_a_pickle_inside_an_array_is_not_opened(import_fails, tmp_path):
    np.save(tmp_path / "rows.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert "is damaged" in import_fails(tmp_path / "rows.npy")


def test_several_tensors_are_refused(import_fails, tmp_path):
    save_file({"a": PLAIN_ROWS, "b": PLAIN_ROWS + 1}, tmp_path / "rows.safetensors")
    assert "must hold one tensor, the rows, it holds a, b" in import_fails(tmp_path / "rows.safetensors")


@pytest.mark.parametrize("name", ["decoder.pt", "rows.ckpt", 'it\'s "my" rows.bin', "rows.pth", "rows.pkl"])
@pytest.mark.parametrize("shape", ["tensor", "dictionary"])
def test_a_pickle_is_refused_and_its_conversion_works(import_fails, bases, tmp_path, name, shape):
    place = tmp_path / "prompt_prefixes" / "my-task" / name
    place.parent.mkdir(parents=True)
    torch.save(PLAIN_ROWS if shape == "tensor" else {"prompt_embeddings": torch.nn.Parameter(PLAIN_ROWS)}, place)
    for source in (place, place.parent):
        error = import_fails(source)
        assert "is a pickle, which can run code" in error
    convert(error)
    import_prompt(place.parent, tmp_path / "prompt", [f"model.name={bases().name}", "model.device=cpu"])
    assert torch.equal(load_prompt(tmp_path / "prompt", bases()).soft.rows_PH, PLAIN_ROWS)


def convert(error: str) -> None:
    """Runs the command that the refusal names."""
    subprocess.run(error[error.index("python -c") :].replace("python", sys.executable, 1), shell=True, check=True)


def test_a_pickled_adapter_is_refused_and_its_conversion_works(import_fails, bases, tmp_path):
    adapter = trained_by_peft(bases(), "multitask", tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    torch.save(tensors, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    error = import_fails(adapter)
    assert "adapter_model.bin is a pickle" in error
    convert(error)
    import_prompt(adapter, tmp_path / "prompt", ["model.device=cpu"], 0)
    assert load_prompt(tmp_path / "prompt", bases()).soft.length == LENGTH


def test_a_store_of_prefixes_names_those_below(import_fails, tmp_path):
    for task in ("one", "two"):
        write_plain(tmp_path / "prompt_prefixes" / task / "decoder.safetensors")
    assert f"holds 2 prompts: name one, e.g. {tmp_path / 'prompt_prefixes' / 'one'}" in import_fails(tmp_path / "prompt_prefixes")


def test_a_prefix_of_an_encoder_is_refused(import_fails, tmp_path):
    folder = write_plain(tmp_path / "store" / "decoder.safetensors").parent
    torch.save(PLAIN_ROWS, folder / "encoder.pt")
    assert "belongs to an encoder-decoder model" in import_fails(folder)


@pytest.mark.filterwarnings("ignore:Could not find a config file")  # peft 0.20 looks for a base that lies nowhere
def test_an_encoder_decoder_adapter_is_refused(import_fails, tmp_path):
    model = T5ForConditionalGeneration(T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4))
    adapted = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3))
    adapted.save_pretrained(tmp_path / "adapter")
    assert "belongs to an encoder-decoder model" in import_fails(tmp_path / "adapter")


def test_an_adapter_of_layers_is_refused(import_fails, bases, tmp_path):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(bases().name), config).save_pretrained(tmp_path / "adapter")
    assert "is a LORA adapter, no soft prompt" in import_fails(tmp_path / "adapter")


def changed(adapter: Path, **values) -> Path:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return adapter


def test_adapters_that_do_not_hold_what_they_say_are_refused(import_fails, bases, tmp_path):
    adapter = trained_by_peft(bases(), "prompt", tmp_path / "adapter")
    weights = adapter / "adapter_model.safetensors"
    assert "leave out --task-id" in import_fails(adapter, "--task-id", "0")
    assert "holds 5 rows, its adapter_config.json says 6" in import_fails(changed(adapter, num_virtual_tokens=6))
    assert "not for CAUSAL_LM" in import_fails(changed(adapter, num_virtual_tokens=LENGTH, task_type="SEQ_CLS"))
    assert "must hold prompt_embeddings" in import_fails(changed(adapter, task_type="CAUSAL_LM", peft_type="MULTITASK_PROMPT_TUNING"))
    changed(adapter, peft_type="PROMPT_TUNING")
    assert "does not say which base" in import_fails(changed(adapter, base_model_name_or_path=""), base=False)
    save_file(load_file(weights) | {"extra": torch.zeros(1)}, weights)
    assert "must hold one tensor" in import_fails(adapter)
    weights.unlink()
    assert "is missing" in import_fails(adapter)
    (adapter / "adapter_config.json").write_text("[]")
    assert "is damaged" in import_fails(adapter)


def test_a_task_must_be_chosen_and_must_be_there(import_fails, bases, tmp_path):
    adapter = trained_by_peft(bases(), "multitask", tmp_path / "adapter")
    assert "holds the prompts of 3 tasks: choose one with --task-id 0 to 2" in import_fails(adapter)
    assert "holds tasks 0 to 2" in import_fails(adapter, "--task-id", "3")
    assert "holds tasks 0 to 2" in import_fails(adapter, "--task-id=-1")
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"prefix_task_cols": tensors["prefix_task_cols"][:, :-1].contiguous()}, weights)
    assert "do not fit each other" in import_fails(adapter, "--task-id", "0")


def test_a_prefix_of_another_base_is_refused(import_fails, bases, tmp_path):
    adapter = trained_by_peft(bases(), "prefix", tmp_path / "adapter")
    other = tiny.tiny_folder(tmp_path / "other", num_key_value_heads=4)
    assert "of other shapes" in import_fails(adapter, f"model.name={other}", "model.device=cpu", base=False)
    assert "leave out prompt.position" in import_fails(adapter, "prompt.position=after_bos")
    assert "leave out prompt.method" in import_fails(adapter, "prompt.method=prompt")


def test_what_is_there_already_is_kept(refused, bases, tmp_path):  # noqa: F811
    file = write_plain(tmp_path / "rows.npy")
    (tmp_path / "prompt").mkdir()
    (tmp_path / "prompt" / "mine").write_text("mine")
    assert "exists: choose another folder" in refused("import", file, "--out", tmp_path / "prompt", f"model.name={bases().name}")
    assert [found.name for found in (tmp_path / "prompt").iterdir()] == ["mine"]


def test_what_needs_no_import_or_is_nothing_is_refused(import_fails, bases, tmp_path):
    import_prompt(write_plain(tmp_path / "rows.npy"), tmp_path / "ours", [f"model.name={bases().name}", "model.device=cpu"])
    assert "needs no import" in import_fails(tmp_path / "ours")
    assert "needs no import" in import_fails(tmp_path / "ours" / "adapter_model.safetensors")
    assert "no such file or folder" in import_fails(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "nothing to import" in import_fails(tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("rows")
    assert "not something to import" in import_fails(tmp_path / "notes.txt")
    assert "does not say which base" in import_fails(tmp_path / "rows.npy", base=False)
