"""A GGUF file whose vocabulary holds the prompts: llama.cpp, Ollama and their kin serve it with ordinary tokens.

Every tensor but the table and the head is copied as it is. The rows are written in the table's own quantisation where the gguf library
can write it; of the K and I kinds, which it can only read, the table and the head alone are rewritten in Q8_0.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, Keys, TokenType
from gguf.quants import dequantize, quantize
from transformers.utils import cached_file

from softprompt.errors import ArtifactError, ConfigError
from softprompt.export.carried import Carried, Exported, Goal
from softprompt.export.chat import chat_template, check_ids, extended_tokenizer, frame, own_text
from softprompt.export.silence import silence

FILE, TABLE, HEAD = "model.gguf", "token_embd.weight", "output.weight"
SAMPLE = 64  # rows that are compared with the base's
ALIKE = 0.2  # relative error up to which a table counts as a quantised form of the base's
TEMPLATE = "tokenizer.chat_template"
Array = Any  # a NumPy array


def export(goal: Goal) -> Exported:
    """Fills the draft with model.gguf and an Ollama Modelfile for each prompt.

    Raises ConfigError without a GGUF file of the base, ArtifactError for one of another model.
    """
    reader = GGUFReader(source_of(goal))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if TABLE not in tensors:
        raise ArtifactError(f"{source_of(goal)} has no {TABLE}: it is no language model")
    _check_base(goal, reader, tensors[TABLE])
    tokenizer = extended_tokenizer(goal)
    for prompt in goal.prompts:
        check_ids(prompt, tokenizer)
    tokens = reader.fields[Keys.Tokenizer.LIST].contents()
    first = _first_free(tokens, reader)
    ids = list(range(first, first + len(goal.tokens)))
    mute = silence(goal.base, goal.prompts)
    table, kind = _extended(tensors[TABLE], ids, goal.rows_NH.numpy())
    head, head_kind = _extended(tensors.get(HEAD, tensors[TABLE]), ids, mute.row_H.expand(len(ids), -1).contiguous().numpy())
    _write(goal, reader, ids, {TABLE: (table, kind), HEAD: (head, head_kind)})
    for prompt in goal.prompts:
        name = "Modelfile" if len(goal.prompts) == 1 else f"Modelfile.{prompt.name}"
        (goal.draft / name).write_text(
            _modelfile(prompt, goal.base.tokenizer.convert_ids_to_tokens(goal.new_end_ids)), encoding="utf-8", newline="\n"
        )
    checked = _read_back(goal, ids)
    files = sorted(file.name for file in goal.draft.iterdir())
    notes = (mute.note, f"table in {kind.name}, head in {head_kind.name}", *_bos_note(goal), *_end_note(goal))
    return Exported("gguf", goal.base.name, goal.facts(ids), files, checked, notes)


def source_of(goal: Goal) -> Path:
    """The base as a GGUF file. Raises ConfigError where there is none."""
    name, gguf_file = goal.model.location
    if goal.gguf_file is not None:
        if not goal.gguf_file.is_file():
            raise ConfigError(f"--gguf {goal.gguf_file}: no such file")
        return goal.gguf_file
    if gguf_file is None:
        raise ConfigError(
            f"{name} is no GGUF file: give the same base as one with --gguf FILE (llama.cpp's convert_hf_to_gguf.py makes it)"
        )
    return Path(cached_file(name, gguf_file, revision=goal.model.revision))


def _check_base(goal: Goal, reader: Any, table: Any) -> None:
    """Raises ArtifactError when the file is not the base, in whatever quantisation."""
    ours_VH = goal.base.model.get_input_embeddings().weight
    width = int(table.shape[0])
    if width != ours_VH.shape[1]:
        raise ArtifactError(f"{source_of(goal)} has rows of {width} numbers, {goal.base.name} has {ours_VH.shape[1]}: it is another model")
    some = np.linspace(0, min(len(table.data), goal.base.num_tokens) - 1, SAMPLE).astype(int)
    theirs = torch.from_numpy(dequantize(table.data[some], table.tensor_type).reshape(len(some), width).copy())
    ours = ours_VH[torch.from_numpy(some).to(ours_VH.device)].float().cpu()
    if not (theirs - ours).norm() <= ALIKE * ours.norm():
        raise ArtifactError(f"{source_of(goal)} is not {goal.base.name} in another form: its embedding table differs")
    taken = set(reader.fields[Keys.Tokenizer.LIST].contents()) & set(goal.tokens)
    if taken:
        raise ArtifactError(f"{source_of(goal)} has a token {min(taken)} already: rename the prompt's folder")


def _first_free(tokens: Sequence[str], reader: Any) -> int:
    """Behind the vocabulary's last token; padding that converters write is free."""
    types = reader.fields[Keys.Tokenizer.TOKEN_TYPE].contents() if Keys.Tokenizer.TOKEN_TYPE in reader.fields else []
    free = len(tokens)
    while free and len(types) == len(tokens) and types[free - 1] == TokenType.UNUSED and tokens[free - 1].startswith("[PAD"):
        free -= 1
    return free


def _extended(tensor: Any, ids: list[int], rows: Array) -> tuple[Array, GGMLQuantizationType]:
    """The tensor's data with `rows` at `ids`, and its type."""
    kind, data = tensor.tensor_type, tensor.data
    try:
        own = quantize(rows, kind)
    except NotImplementedError:
        kind = GGMLQuantizationType.Q8_0
        own, data = quantize(rows, kind), quantize(dequantize(data, tensor.tensor_type), kind)
    size = max(len(data), ids[-1] + 1)
    grown = np.zeros((size, data.shape[1]), data.dtype)
    grown[: len(data)] = data
    grown[ids] = own
    return grown, kind


# ---- writing -------------------------------------------------------------------------------------------------------


def _write(goal: Goal, reader: Any, ids: list[int], changed: dict[str, tuple[Array, GGMLQuantizationType]]) -> None:
    architecture = reader.fields[Keys.General.ARCHITECTURE].contents()
    writer = GGUFWriter(goal.draft / FILE, architecture, endianess=reader.endianess)
    fields = _fields(goal, reader, ids, len(changed[TABLE][0]), architecture)
    for name, (value, kind, sub_kind) in fields.items():
        writer.add_key_value(name, value, kind, sub_type=sub_kind)
    data = {tensor.name: (tensor.data, tensor.tensor_type) for tensor in reader.tensors} | changed
    for name, (values, kind) in data.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values, _ in data.values():
        writer.write_tensor_data(values, tensor_endianess=reader.endianess)
    writer.close()


def _fields(goal: Goal, reader: Any, ids: list[int], size: int, architecture: str) -> dict[str, tuple[Any, Any, Any]]:
    """The metadata, the vocabulary's lists grown, with the chat template."""
    fields = {}
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != Keys.General.ARCHITECTURE:
            kind = field.types[0]
            fields[field.name] = (field.contents(), kind, field.types[-1] if kind == GGUFValueType.ARRAY else None)
    new: dict[str, list[Any]] = {
        Keys.Tokenizer.LIST: list(goal.tokens),
        Keys.Tokenizer.TOKEN_TYPE: [int(TokenType.CONTROL)] * len(ids),
        Keys.Tokenizer.SCORES: [0.0] * len(ids),
    }
    for name, values in new.items():
        if name in fields:
            held, kind, sub_kind = fields[name]
            fields[name] = (held[: ids[0]] + values + held[ids[-1] + 1 :], kind, sub_kind)
    vocab_size = Keys.LLM.VOCAB_SIZE.format(arch=architecture)
    if vocab_size in fields:
        fields[vocab_size] = (size, *fields[vocab_size][1:])
    own = fields[TEMPLATE][0] if TEMPLATE in fields else own_text(goal.base.tokenizer)
    fields[TEMPLATE] = (chat_template(goal.prompts, own, goal.default), GGUFValueType.STRING, None)
    known = fields[Keys.Tokenizer.EOT_ID][0] if Keys.Tokenizer.EOT_ID in fields else None
    if goal.new_end_ids and known not in goal.new_end_ids:  # an engine stops at EOS and at the end of a turn, which is one token
        fields[Keys.Tokenizer.EOT_ID] = (goal.new_end_ids[0], GGUFValueType.UINT32, None)
    if _bos_note(goal):
        fields[Keys.Tokenizer.ADD_BOS] = (False, GGUFValueType.BOOL, None)
    return fields


def _bos_note(goal: Goal) -> tuple[str, ...]:
    """Where rows stand before BOS, an engine that adds BOS by itself would put a second one before them."""
    if not any(prompt.soft.position == "start" and prompt.soft.bos_id is not None for prompt in goal.prompts):
        return ()
    return ("the file tells engines to add no BOS, for these rows stand before it: a text without a prompt must begin with it",)


def _end_note(goal: Goal) -> tuple[str, ...]:
    more = [goal.base.tokenizer.convert_ids_to_tokens(token) for token in goal.new_end_ids[1:]]
    return (f"the file names one token that ends a turn: tell the engine to stop at {', '.join(more)} too",) if more else ()


def _modelfile(prompt: Carried, stops: Sequence[str]) -> str:
    """For Ollama, whose templates are Go's."""
    before, behind = frame(prompt)
    opening = prompt.opening.removeprefix(prompt.bos)  # a first BOS is the engine's
    text = [part.replace("{{", '{{ "{{" }}') for part in (opening, before, behind)]
    ends = "".join(f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}\n" for stop in stops)
    return f'FROM ./{FILE}\nTEMPLATE """{text[0]}{text[1]}{{{{ .Prompt }}}}{text[2]}"""\n{ends}'


# ---- reading back --------------------------------------------------------------------------------------------------


def _read_back(goal: Goal, ids: list[int]) -> dict[str, float]:
    """The relative error of the rows in the file's precision. Raises ArtifactError where tokens or rows are not those written."""
    reader = GGUFReader(goal.draft / FILE)
    listed = reader.fields[Keys.Tokenizer.LIST].contents()
    table = next(tensor for tensor in reader.tensors if tensor.name == TABLE)
    rows = torch.from_numpy(dequantize(table.data[ids], table.tensor_type).reshape(len(ids), -1).copy())
    error = ((rows - goal.rows_NH).norm() / goal.rows_NH.norm()).item()
    if [listed[token] for token in ids] != list(goal.tokens) or len(listed) > len(table.data) or not error < ALIKE:
        raise ArtifactError(f"read back, the file's new rows differ from the prompts' by {error:.1e}")
    return {"rows_relative_error": error}
