"""One chat template for a base and its prompts, which are chosen by name.

A chat names a prompt by the template argument `softprompt`, or by a first system message `softprompt:NAME`. Without a name it gets
the default prompt; else the base's own template, or `Human: ...` where it has none. Every branch writes BOS itself, where the prompt
had it in training.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken

from softprompt.data import Example, Message
from softprompt.errors import ArtifactError
from softprompt.export.carried import QUESTIONS, Carried, Goal
from softprompt.templates import Chat, HumanAssistant

# A template's own text stands between these as it is; only the first newline behind a block's end would be lost.
NAMED = """{%- set sp = namespace(name=softprompt | default(DEFAULT, true), messages=messages, last='') -%}
{%- if messages and messages[0]['role'] == 'system' and messages[0]['content'] is string
    and messages[0]['content'].startswith('softprompt:') -%}
{%- set sp.name = messages[0]['content'][11:] | trim -%}{%- set sp.messages = messages[1:] -%}
{%- endif -%}
"""
HUMAN_ASSISTANT = """{%- for message in sp.messages -%}
{%- if message['role'] == 'system' -%}{{ message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'user' -%}
{{ ('\\n\\n' if sp.last == 'assistant' else '') + ('Human: ' + message['content']) | trim + '\\n\\nAssistant: ' }}
{%- else -%}{{ message['content'] + EOS }}
{%- endif -%}{%- set sp.last = message['role'] -%}
{%- endfor -%}"""
FIELDS = """{%- for message in sp.messages if message['role'] == 'system' -%}{{ message['content'] + '\\n' }}{%- endfor -%}
{%- set messages = sp.messages | rejectattr('role', 'equalto', 'system') | list -%}
{%- set prompt = messages[-1]['content'] -%}{%- set instruction = prompt -%}{%- set text = prompt -%}{%- set input = '' -%}"""
# Conversations without a system turn get that of the prompt's rows.
SYSTEM_TURN = """{%- if not sp.messages or sp.messages[0]['role'] != 'system' -%}
{%- set sp.messages = [{'role': 'system', 'content': SYSTEM}] + sp.messages -%}
{%- endif -%}
"""


def chat_template(prompts: Sequence[Carried], own: str | None, default: str | None, openings: Mapping[str, str] | None = None) -> str:
    """`own`: the base's template for chats without a prompt, or None. `default`: the prompt of a chat that names none. `openings`: what
    stands for each prompt, by name; by default the tokens of its rows."""
    known = ", ".join(prompt.name for prompt in prompts)
    parts = [NAMED.replace("DEFAULT", quoted(default or ""))]
    for prompt in prompts:
        parts.append(f"{{%- {'if' if prompt is prompts[0] else 'elif'} sp.name == {quoted(prompt.name)} -%}}")
        opening = prompt.opening if openings is None else openings[prompt.name]
        parts.append(_branch(prompt, "{{ " + quoted(opening) + " }}"))
    parts.append("{%- elif sp.name -%}{{ raise_exception('there is no soft prompt ' + sp.name + '; there are: ' + KNOWN) }}")
    tokenizer = prompts[0].encoder.tokenizer
    plain = "{{ " + quoted(prompts[0].bos) + " }}" + HUMAN_ASSISTANT.replace("EOS", quoted(tokenizer.eos_token))
    parts.append("{%- else %}" + (_whole(own) if own else plain) + "{% endif %}")
    return "".join(parts).replace("KNOWN", quoted(known))


def with_rows_from_message(prompt: Carried) -> str:
    """A template for engines that take the rows as the content of a first system message."""
    soft = prompt.soft
    bos = "" if soft.bos_id is None else quoted(prompt.bos)
    opening = " ~ ".join(part for part in ((bos, "sp.rows") if soft.position == "after_bos" else ("sp.rows", bos)) if part)
    first = "{%- set sp = namespace(rows=messages[0]['content'], messages=messages[1:], last='') -%}"
    return first + _branch(prompt, "{{ " + opening + " }}")


def without_opening(prompt: Carried) -> str:
    """A template of what stands behind BOS and the prompt."""
    return "{%- set sp = namespace(messages=messages, last='') -%}" + _branch(prompt, "")


def _branch(prompt: Carried, opening: str) -> str:
    """A chat in the prompt's template, behind what opens it."""
    encoder = prompt.encoder
    system = "" if encoder.system is None else SYSTEM_TURN.replace("SYSTEM", quoted(encoder.system))
    if isinstance(encoder.template, HumanAssistant):
        return system + opening + HUMAN_ASSISTANT.replace("EOS", quoted(encoder.tokenizer.eos_token))
    if not isinstance(encoder.template, Chat):
        return system + opening + FIELDS + "{% if true %}" + encoder.template.name + "{% endif %}"
    whole = _whole(encoder.template.text())
    shown = system + "{%- set messages = sp.messages -%}{% set shown %}" + whole + "{% endset %}" + opening
    if not prompt.bos:
        return shown + "{{ shown }}"
    bos = quoted(prompt.bos)
    return shown + "{{ shown[(" + bos + " | length):] if shown.startswith(" + bos + ") else shown }}"


def _whole(template: str) -> str:
    """A template inside another: alone, its last newline would not be written."""
    return template.removesuffix("\n")


def quoted(text: str) -> str:
    """A Jinja string."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


# ---- what a chat becomes -------------------------------------------------------------------------------------------


def own_text(tokenizer: Any) -> str | None:
    """The chat template of a base, or None where it has none, or several and none that is the default."""
    known = tokenizer.chat_template
    return known.get("default") if isinstance(known, Mapping) else known


def extended_tokenizer(goal: Goal) -> Any:
    """The base's tokenizer with the prompts' tokens and the template that chooses among them."""
    tokenizer = copy.deepcopy(goal.base.tokenizer)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in goal.tokens], special_tokens=True)
    tokenizer.chat_template = chat_template(goal.prompts, own_text(tokenizer), goal.default)
    return tokenizer


def chat_ids(tokenizer: Any, prompt: Carried, question: str) -> list[int]:
    """What a chat with this prompt becomes: the template's text, then its tokens."""
    turns = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, softprompt=prompt.name)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def check_ids(prompt: Carried, tokenizer: Any) -> None:
    """Raises ArtifactError where the exported tokenizer and template make other ids than training did."""
    rows = tokenizer.convert_tokens_to_ids(list(prompt.tokens))
    soft = prompt.soft
    bos = [] if soft.bos_id is None else [soft.bos_id]
    start = [*bos, *rows] if soft.position == "after_bos" else [*rows, *bos]
    for question in QUESTIONS:
        given = chat_ids(tokenizer, prompt, question)
        if given != [*start, *prompt.asked(question)]:
            shown = tokenizer.decode([token for token in given if token not in rows])
            raise ArtifactError(
                f"{prompt.name}: as a chat template, its template writes another text than in training: for {question!r} it gives "
                f"{shown!r}; train with a data.template that has no line breaks between its blocks"
            )


def frame(prompt: Carried) -> tuple[str, str]:
    """What stands before and behind a question in the prompt's template. Raises ArtifactError where it is more than text around it."""
    mark = "QUESTION-0192837465"
    asked = Example((Message("user", mark),), "export", fields={"prompt": mark, "instruction": mark, "input": "", "text": mark})
    before, *behind = "".join(segment.text for segment in prompt.encoder.segments(asked)).split(mark)
    if len(behind) != 1:
        raise ArtifactError(f"{prompt.name}: its template writes the question {len(behind)} times: no plain text stands around it")
    return before, behind[0]
