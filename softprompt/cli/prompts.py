"""What is done with a trained prompt."""

import hashlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from softprompt.cli import completion
from softprompt.cli.options import (
    AnswerField,
    Engine,
    EngineHere,
    FileOfQuestions,
    HeldOut,
    Json,
    MaxNewTokens,
    OtherBase,
    OutOfFile,
    Overrides,
    PromptPath,
    Resume,
    Seed,
    SystemTurn,
    Temperature,
    TopK,
    TopP,
    app,
    base_by,
    write_json,
)
from softprompt.errors import ConfigError
from softprompt.extras import need

if TYPE_CHECKING:
    from softprompt.generation import Piece


TOGETHER = (
    "--in FILE and --out ANSWERS.jsonl go together (--resume and --answer-field belong to them), with one prompt or --ensemble, "
    "without texts and --json"
)
NAMED = 3  # rows that cannot be answered, of which the reason is shown


Beside = Annotated[
    list[Path] | None, typer.Option("--with", metavar="PROMPT", help="Answer with this prompt too, in the same batch; repeatable.")
]


class Together(StrEnum):
    mean = "mean"
    vote = "vote"


@app.command("eval")
def evaluate(
    prompt: PromptPath,
    overrides: Overrides = None,
    data: HeldOut = None,
    other: Annotated[
        list[Path] | None, typer.Option("--with", metavar="PROMPT|ADAPTER", help="Another prompt, or a PEFT adapter; repeatable.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="Text prompt to compare with, instead of the prompt's init text.")] = None,
    shots: Annotated[
        str | None, typer.Option(metavar="FILE", help="Rows to take few-shot examples from; left out, the run's training rows.")
    ] = None,
    ensemble: Annotated[bool, typer.Option("--ensemble", help="All prompts compete together too.")] = False,
    answers: Annotated[bool, typer.Option("--answers", help="Generate answers and score them too.")] = False,
    metric: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A metric instead of those that suit the rows, or module:function; repeatable.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of an answer; left out, by the longest reference.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the results get a folder; left out, in the run.")] = None,
    allow_other_base: OtherBase = False,
    json_file: Json = None,
) -> None:
    """Compare soft prompts with the bare base, a text prompt and a few examples, all on the same held-out rows."""
    from softprompt.arguments import read_arguments

    given = read_arguments(prompt, other or [], data, shots, overrides or [])
    from softprompt import Contest
    from softprompt.engine.processes import joined
    from softprompt.metrics import metric_named
    from softprompt.screen.prompts import draw_evaluation
    from softprompt.trackers import check_trackers, tracking

    for name in metric or []:
        metric_named(name)
    check_trackers(given.trackers)
    contest = Contest(text, None, ensemble, given.adapters, tuple(metric or ()), answers, max_new_tokens)
    with joined() as world:
        result = _evaluated(given, contest, out or given.results, allow_other_base, world)
    draw_evaluation(result)
    write_json(json_file, {"prompt": str(prompt), "data": given.source, **result.as_dict()})
    place, trackers = given.run.path if given.run else prompt, given.trackers if world.first else ()
    with tracking(trackers, given.of_run or given.config, place, f"{place.name} eval") as track:
        for sheet in result.sheets():
            track.table(sheet, 0)


def _evaluated(given: Any, contest: Any, out: Path | None, allow_other_base: bool, world: Any) -> Any:
    """What comes of the contest; its rows to take examples from, and what the prompts were distilled of, are those of the arguments."""
    from softprompt import load_base, load_prompt
    from softprompt.evaluation import evaluating
    from softprompt.screen.prompts import follow_evaluation

    loaded, train = (None, None) if given.is_distilled else given.rows()
    base = load_base(world.placed(given.config.model))
    study = given.study(base, world)
    loaded = given.rows_beside(study) if study is not None else loaded
    assert loaded is not None, "rows of a file or of the study"
    prompts = [(name, load_prompt(path, base, allow_other_base=allow_other_base)) for name, path in given.prompts.items()]
    contest = replace(contest, train=train, context=None if study is None else study.context)
    budget = given.config.train.tokens_per_batch
    return follow_evaluation(evaluating(base, prompts, loaded, contest, out=out, tokens_per_batch=budget, world=world))


@app.command()
def inspect(
    prompt: PromptPath,
    overrides: Overrides = None,
    data: HeldOut = None,
    rows: Annotated[int, typer.Option(min=0, help="Held-out rows to measure each row's worth on; 0 leaves it out.")] = 64,
    allow_other_base: OtherBase = False,
    json_file: Json = None,
) -> None:
    """Show a prompt's rows: their size, the tokens they lie near, how far they moved, what the loss is without each."""
    from softprompt import inspection
    from softprompt.arguments import opened
    from softprompt.screen.prompts import draw_inspection

    found = opened(prompt, data, rows, overrides or [], allow_other_base)
    result = inspection.inspect(found.base, found.prompt, found.held, found.start(), found.tokens_per_batch)
    draw_inspection(result)
    if found.held:
        found.keep(result.as_dict())
    write_json(json_file, {"prompt": str(prompt), **result.as_dict()})


@app.command()
def prune(
    prompt: PromptPath,
    overrides: Overrides = None,
    keep: Annotated[int, typer.Option(help="Rows to keep.")] = 0,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for the shorter prompt.")] = None,
    data: HeldOut = None,
    rows: Annotated[int, typer.Option(min=1, help="Held-out rows to measure on.")] = 64,
    allow_other_base: OtherBase = False,
    json_file: Json = None,
) -> None:
    """Write a shorter prompt: the rows that are missed least are left out, one after the other; the loss is measured."""
    if out is None:
        raise ConfigError("where does the shorter prompt go? give --out DIR")
    if out.exists():
        raise ConfigError(f"--out {out} exists: choose another folder")
    from softprompt import inspection
    from softprompt.arguments import opened
    from softprompt.artifact import write_prompt
    from softprompt.atomic import new_folder
    from softprompt.screen.console import console

    found = opened(prompt, data, rows, overrides or [], allow_other_base)
    shorter, before, after = inspection.prune(found.base, found.prompt, found.held, keep, found.tokens_per_batch)
    with new_folder(out) as draft:
        write_prompt(draft, shorter.soft, shorter.card, found.base)
    console.print(
        f"{found.prompt.soft.length} rows: held-out loss {before:.4f}; {keep} rows: {after:.4f} ({len(found.held)} held-out rows)"
    )
    console.print(f"written to {out}", markup=False)
    result = {"loss_before": before, "loss_after": after, "num_virtual_tokens": keep, "held_out_rows": len(found.held)}
    write_json(json_file, {"prompt": str(out), **result})


@app.command()
def generate(
    prompt: PromptPath,
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TEXT ...] [model.key=value ...]",
            help="Texts; without any, one per line of the input.",
            autocompletion=completion.base_settings,
        ),
    ] = None,
    other: Beside = None,
    source: FileOfQuestions = None,
    out: OutOfFile = None,
    resume: Resume = False,
    answer_field: AnswerField = "answer",
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
    together: Annotated[
        Together | None, typer.Option("--ensemble", help="All prompts give one answer together, those of a bank's run folder included.")
    ] = None,
    system: SystemTurn = None,
    allow_other_base: OtherBase = False,
    engine: Engine = EngineHere.own,
    json_file: Json = None,
) -> None:
    """Answer texts with one soft prompt, with several in one batch, or with several that agree on one answer."""
    overrides = [item for item in texts or [] if re.match(r"(model|data\.columns)\.\w+=", item)]
    asked = [item for item in texts or [] if item not in overrides]
    files = _Files(source, out, resume, answer_field) if source is not None and out is not None else None
    if (asked or json_file or (other and not together)) if files else (source or out or resume or answer_field != "answer"):
        raise ConfigError(TOGETHER)
    if not files and not (asked := asked or _lines_of_input()):
        raise ConfigError("no text to answer")
    from softprompt import Sampling
    from softprompt.generation import Ensemble, check_sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed)
    check_sampling(sampling, [Ensemble((), together.value)] if together else [])
    places = _places([prompt, *(other or [])], together)
    answerers = partial(_answerers, places, partial(base_by, engine, base_config(places[0], overrides)), together, system, allow_other_base)
    if files:
        made_with = {"prompt": _digest(places), "system": system, "ensemble": together, "sampling": sampling.as_dict()}
        _answer_file(answerers, sampling, files, overrides, made_with)
    else:
        base, each = answerers()
        _answer_texts(base, each, asked, sampling, json_file)


def _lines_of_input() -> list[str]:
    try:
        return [line.rstrip("\n") for line in sys.stdin if line.strip()]
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"the standard input is not {error.encoding}: put the texts into a file and use --in, or set PYTHONUTF8=1"
        ) from None


@dataclass(frozen=True)
class _Files:
    source: str
    out: Path
    resume: bool
    answer_field: str


def _places(given: list[Path], together: Together | None) -> list[Path]:
    """The folders of the prompts; of a bank, all that answer together."""
    from softprompt.artifact import find_prompts

    return [path for place in given for path in find_prompts(place)] if together else given


def _answerers(places: list[Path], load: Callable[[], Any], together: Together | None, system: str | None, allow_other_base: bool) -> Any:
    """(the base, (path, who answers) of each)."""
    from softprompt import Ensemble, load_prompt

    base = load()
    loaded = (load_prompt(path, base, allow_other_base=allow_other_base) for path in places)
    stored = [one if system is None else one.told(system) for one in loaded]
    return base, [(places[0], Ensemble(tuple(stored), together.value))] if together else list(zip(places, stored, strict=True))


def _answer_texts(base: Any, each: "list[tuple[Path, Any]]", asked: list[str], sampling: Any, json_file: Path | None) -> None:
    """On the screen, one after the other."""
    from softprompt.generation import stream
    from softprompt.screen.prompts import draw_stream

    jobs = [(path, one, text) for text in asked for path, one in each]
    headings = [f"{text}  ({path})" if len(each) > 1 else text for path, _, text in jobs]
    thoughts = [""] * len(jobs)
    pieces = _keeping_thoughts(stream(base, [one for _, one, _ in jobs], [text for _, _, text in jobs], sampling), thoughts)
    answers = draw_stream(pieces, headings)
    rows = [
        {"prompt": str(path), "text": text, "answer": answer, "thought": thought}
        for (path, _, text), answer, thought in zip(jobs, answers, thoughts, strict=True)
    ]
    write_json(json_file, {"answers": rows})


def _answer_file(answerers: "Callable[[], Any]", sampling: Any, files: _Files, overrides: list[str], made_with: dict[str, Any]) -> None:
    """Into a file, with a bar; what is wrong with it is said before the base is loaded, what could not be answered at the end."""
    from softprompt.answering import Named, Task, answer_file, check_out, failures
    from softprompt.config import load_config
    from softprompt.data import Questions
    from softprompt.screen.prompts import follow_answers

    check_out(files.out, files.resume)
    named, columns = Named(files.answer_field), load_config(None, overrides).data.columns
    questions = Questions(files.source, columns)
    found = questions.survey([named.answer, named.error])
    base, ((_, one), *_) = answerers()
    task = Task(base, one, questions, found.num_rows, sampling, named)
    told = {**made_with, **_about(base), "questions": found.digest, "columns": dict(columns), "answer_field": named.answer}
    try:
        follow_answers(answer_file(task, files.out, told, resume=files.resume), files.out)
    except KeyboardInterrupt:
        print("stopped; the same command goes on with --resume", file=sys.stderr)
        raise
    failed, first = failures(files.out, named, most=NAMED)
    for reason in first:
        print(f"  {reason}", file=sys.stderr)
    if failed:
        print(f"{failed} of {found.num_rows} could not be answered: their lines in {files.out} have {named.error}", file=sys.stderr)


def _about(base: Any) -> dict[str, str]:
    """What answers depend on of a base and who computes it."""
    from softprompt.engine.model import FrozenBase

    if isinstance(base, FrozenBase):
        return {"base": base.fingerprint, "dtype": str(base.dtype)}
    return {"base": base.content, "engine": EngineHere.llama.value}


def _digest(places: list[Path]) -> list[str]:
    """What the prompts are, wherever they lie."""
    from softprompt.artifact import WEIGHTS, find_prompt

    return [_sha256((find_prompt(path) / WEIGHTS).read_bytes() + (find_prompt(path) / "card.json").read_bytes()) for path in places]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _keeping_thoughts(pieces: "Iterable[Piece]", thoughts: list[str]) -> "Iterator[Piece]":
    """The pieces as they come; what belongs to thinking blocks is added up by text."""
    for piece in pieces:
        thoughts[piece.row] += piece.thought
        yield piece


@app.command("lm-eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def lm_eval(context: typer.Context) -> None:
    """Run the lm-evaluation-harness, which then knows --model softprompt --model_args prompt=PROMPT; all else is its own."""
    need("lm_eval", "this command")
    from lm_eval.__main__ import cli_evaluate

    from softprompt import harness  # noqa: F401 - registers the model

    sys.argv = ["softprompt lm-eval", *context.args]
    cli_evaluate()


def base_config(prompt: Path, overrides: list[str]) -> Any:
    """The base that a stored prompt was trained for, then the overrides."""
    from softprompt.artifact import read_card

    return read_card(prompt).base_here(overrides)
