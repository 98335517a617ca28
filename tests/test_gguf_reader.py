"""A GGUF file's metadata read quickly: the same as the gguf library reads, and the same base."""

import gguf
import pytest
import torch
from other_engines import tiny_gguf
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from softprompt.config import ModelConfig
from softprompt.engine.gguf_reader import BareReader, QuickReader, quick_reader
from softprompt.engine.loading import load_base

TEXT = "  bring tea, 请给我一杯茶！\n\t茶 👩‍👩‍👧 naïve 12,345"


@pytest.fixture
def file(bases, tmp_path):
    return tiny_gguf(tmp_path / "base.gguf", bases())


def test_the_fields_and_tensors_are_the_librarys(file):
    theirs, ours = gguf.GGUFReader(file), QuickReader(file)
    assert list(ours.fields) == list(theirs.fields)
    for name, field in theirs.fields.items():
        assert (ours.fields[name].contents(), ours.fields[name].types) == (field.contents(), field.types), name
    assert any(len(field.data) > 100 for field in theirs.fields.values()), "there are lists to read"
    for own, tensor in zip(ours.tensors, theirs.tensors, strict=True):
        assert (own.name, own.tensor_type, own.data_offset, own.shape.tolist()) == (
            tensor.name, tensor.tensor_type, tensor.data_offset, tensor.shape.tolist(),
        )  # fmt: skip
        assert (own.data == tensor.data).all()


def test_without_the_vocabulary_its_size_is_left(file):
    ours, theirs = BareReader(file), gguf.GGUFReader(file)
    tokens = gguf.Keys.Tokenizer.LIST
    assert len(ours.fields[tokens].data) == len(theirs.fields[tokens].data)
    assert set(theirs.fields) - set(ours.fields) <= {gguf.Keys.Tokenizer.SCORES, gguf.Keys.Tokenizer.TOKEN_TYPE, gguf.Keys.Tokenizer.MERGES}


def test_a_file_that_ends_within_its_texts_is_refused(file, tmp_path):
    at = int(gguf.GGUFReader(file).fields[gguf.Keys.Tokenizer.LIST].offset)
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[: at + 200])
    with pytest.raises(ValueError, match="ends within its metadata"):
        QuickReader(tmp_path / "cut.gguf")


def test_a_base_is_the_one_that_transformers_alone_reads(file, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    base = load_base(ModelConfig(gguf_file=str(file), device="cpu", dtype="float32"))
    assert "de-quantizing" not in capfd.readouterr().err
    assert gguf.GGUFReader is not QuickReader
    assert gguf.GGUFReader is not BareReader
    theirs = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).state_dict()
    ours = base.model.state_dict()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert AutoConfig.from_pretrained(**where).vocab_size == base.model.config.vocab_size
    assert AutoTokenizer.from_pretrained(**where)(TEXT)["input_ids"] == base.tokenizer(TEXT)["input_ids"]


def test_what_was_replaced_comes_back_after_an_error(tmp_path):
    before = gguf.GGUFReader
    with pytest.raises(FileNotFoundError), quick_reader(vocabulary=True):
        gguf.GGUFReader(tmp_path / "nothing.gguf")
    assert gguf.GGUFReader is before
