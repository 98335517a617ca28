"""Prompts for a vLLM server: the keys and values that our KV connector puts into its cache, with the module that does it.

A request for a prompt begins with ids that are nothing but its name, one for each of its positions. Prompts of rows are written as rows
too, for `prompt_embeds` (rows.py).
"""

import copy
import json
import shlex
from collections.abc import Mapping
from typing import Any

from safetensors.torch import load_file

from softprompt.engine.loading import folder_of
from softprompt.engine.prompt import SoftPrompt
from softprompt.errors import ArtifactError, ModelError
from softprompt.export.carried import QUESTION, QUESTIONS, Carried, Exported, Goal
from softprompt.export.chat import chat_ids, chat_template, own_text
from softprompt.export.kv_folder import CONNECTION, KeyValueFolder, Placed, keys_and_values, text_of_name
from softprompt.export.rows import export_vllm_rows

TEMPLATE = "chat.jinja"


def export(goal: Goal) -> Exported:
    """`softprompt_connector.py`, `index.json` and KEY.safetensors, which vLLM reads; `chat.jinja`, where chats can name a prompt; and of
    prompts of rows what `rows.export_vllm_rows` writes.

    Raises ModelError for a base that keeps more than keys and values, and ArtifactError for a prompt that is too short to have a name,
    where it is a deep one: of rows the rows are written.
    """
    rows = export_vllm_rows(goal, [prompt for prompt in goal.prompts if isinstance(prompt.soft, SoftPrompt)])
    placed, notes = _placed(goal)
    if not placed:
        return Exported("vllm", goal.base.name, rows, notes=notes)
    engine = {"start": _start(goal)}
    template = _template(goal, placed)
    if template is not None:
        (goal.draft / TEMPLATE).write_text(template, encoding="utf-8", newline="\n")
        engine["start"] += f" --chat-template DIR/{TEMPLATE}"
    else:
        notes += ("a chat cannot name these prompts by text: ask completions with token ids, or softprompt serve --engine vllm",)
    facts = {
        prompt.name: {
            **rows.get(prompt.name, {"end_ids": prompt.end_ids}),
            **(_facts(goal, prompt, placed[prompt.name]) if prompt.name in placed else {}),
        }
        for prompt in goal.prompts
    }
    notes = (f"start vLLM with {engine['start']}", *notes)
    return Exported("vllm", goal.base.name, facts, checked={"keys_and_values": 0.0}, notes=notes, engine=engine)


def _placed(goal: Goal) -> tuple[dict[str, Placed], tuple[str, ...]]:
    """The prompts whose keys and values are in the folder, read back; why others are not there."""
    folder = KeyValueFolder(goal.draft)
    placed: dict[str, Placed] = {}
    notes: list[str] = []
    for prompt in goal.prompts:
        prefix = prompt.soft.prefix(goal.base)
        try:
            placed[prompt.name] = folder.put(goal.base, prefix)
        except (ArtifactError, ModelError) as error:
            if not isinstance(prompt.soft, SoftPrompt):
                raise
            notes.append(f"{prompt.name} as rows alone: {error}")
            continue
        wanted, found = keys_and_values(goal.base, prefix), load_file(goal.draft / f"{placed[prompt.name].key}.safetensors")
        if wanted.keys() != found.keys() or any(not wanted[part].equal(found[part]) for part in wanted):
            raise ArtifactError(f"{prompt.name}: read back, the keys and values differ from those that were written")
    folder.close()
    return placed, tuple(notes)


def _start(goal: Goal) -> str:
    """The command line; DIR stands for the folder."""
    how = f"--dtype {goal.base.precision} --generation-config vllm"
    told = shlex.quote(json.dumps(CONNECTION))
    return f"PYTHONPATH=DIR vllm serve {shlex.quote(str(folder_of(goal.model)))} {how} --kv-transfer-config {told}"


def _template(goal: Goal, placed: Mapping[str, Placed]) -> str | None:
    """One for all prompts, chosen by name as in chat.py; None where text does not become the ids that are a name. Of whatever stands behind
    it nothing may grow together with it: the prompts' own templates have to begin with a control token."""
    prompts = [prompt for prompt in goal.prompts if prompt.name in placed]
    tokenizer = copy.deepcopy(goal.base.tokenizer)
    if any(prompt.asked(QUESTION)[0] not in tokenizer.added_tokens_decoder for prompt in prompts):
        return None
    openings = {name: text_of_name(tokenizer, one.ids) for name, one in placed.items()}
    tokenizer.chat_template = chat_template(prompts, own_text(tokenizer), goal.default, openings)
    for prompt in prompts:
        if any(chat_ids(tokenizer, prompt, asked) != [*placed[prompt.name].ids, *prompt.asked(asked)] for asked in QUESTIONS):
            return None
    return str(tokenizer.chat_template)


def _facts(goal: Goal, prompt: Carried, placed: Placed) -> dict[str, Any]:
    """`request`: the body of a completion, in which the question's ids stand behind the prompt's."""
    ends = sorted({*prompt.end_ids} - goal.base.stop_ids)
    asked = {"model": str(folder_of(goal.model)), "prompt": [*placed.ids, *prompt.asked(QUESTION)], "max_tokens": 256, "temperature": 0}
    request = {**asked, "stop_token_ids": ends} if ends else asked
    return {"ids": list(placed.ids), "keys_and_values": f"{placed.key}.safetensors", "request": request}
