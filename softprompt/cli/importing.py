"""Prompts that come from elsewhere, and go there: other programs, other bases, the hub."""

from pathlib import Path
from typing import Annotated

import typer

from softprompt.cli.options import HeldOut, Json, Overrides, PromptPath, app, write_json
from softprompt.cli.training import followed
from softprompt.errors import ConfigError

Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the prompt; must not exist.")]
RepoId = Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Model repository of the hub.")]


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="FILE|FOLDER", help="PEFT adapter folder, .safetensors, .npy, or TGIS folder.")],
    out: Out,
    overrides: Overrides = None,
    template: Annotated[
        str | None, typer.Option(help="How the prompt's texts were rendered, a name or Jinja; left out, texts are taken as they are.")
    ] = None,
    task_id: Annotated[int | None, typer.Option(help="Which task of a multitask adapter.")] = None,
    json_file: Json = None,
) -> None:
    """Take in a soft prompt that another program wrote: check it against its base and write a prompt folder with a card."""
    from softprompt.foreign import import_prompt
    from softprompt.peft_here import fault_of_generate
    from softprompt.screen.console import console

    told = [] if template is None else [f"data.template={template}"]
    card, kind = import_prompt(source, out, [*(overrides or []), *told], task_id)
    console.print(f"{card.num_virtual_tokens} virtual tokens ({kind}, {card.position}) for {card.base.name}", markup=False)
    console.print(f"texts are rendered with {card.template}", markup=False)
    console.print(f"written to {out}", markup=False)
    fault = fault_of_generate()  # what is written is a PEFT adapter
    if fault:
        console.print(fault, markup=False)
    result = {"prompt": str(out), "kind": kind, "num_virtual_tokens": card.num_virtual_tokens, "method": card.method}
    notes = [fault] if fault else []
    write_json(json_file, {**result, "position": card.position, "template": card.template, "base": card.base.name, "notes": notes})


@app.command()
def recycle(
    prompt: PromptPath,
    out: Out,
    overrides: Overrides = None,
    data: HeldOut = None,
    tolerance: Annotated[float, typer.Option(min=0, help="It is trained when its loss per token has risen by more than this.")] = 0.01,
    json_file: Json = None,
) -> None:
    """Move a prompt to another variant of its base, e.g. model.name=FOLDER: what it has lost is measured, and trained back if need be."""
    if out.exists():
        raise ConfigError(f"--out {out} exists: choose another folder")
    from softprompt.recycle import move
    from softprompt.screen.prompts import draw_moved, draw_recycled

    moved = move(prompt, overrides or [], data)
    draw_moved(moved, tolerance)
    steps, loss_after = 0, moved.loss_new_base
    if moved.has_lost(tolerance):
        trained = followed(moved.training(out), base=moved.base)
        steps, loss_after = trained["steps"], trained["eval_loss_after"]
    else:
        moved.write(out)
    draw_recycled(moved, out, steps, loss_after)
    write_json(json_file, {"prompt": str(out), **moved.as_dict(), "steps": steps, "loss_after": loss_after})


@app.command()
def push(
    prompt: PromptPath,
    repo_id: RepoId,
    private: Annotated[bool, typer.Option("--private", help="A new repository that only its owner sees.")] = False,
    base_id: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="The base's id, where it lay in a local folder.")] = None,
    json_file: Json = None,
) -> None:
    """Put a prompt on the Hugging Face hub, or the mirror that HF_ENDPOINT names, with its model card."""
    from softprompt import sharing
    from softprompt.screen.console import console

    address = sharing.push(prompt, repo_id, private=private, base_id=base_id)
    console.print(f"pushed to {address}", markup=False)
    write_json(json_file, {"prompt": str(prompt), "repository": repo_id, "address": address})


@app.command()
def pull(
    repo_id: RepoId,
    out: Out,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    json_file: Json = None,
) -> None:
    """Take a prompt from the Hugging Face hub, or the mirror that HF_ENDPOINT names."""
    from softprompt import sharing
    from softprompt.screen.console import console

    card = sharing.pull(repo_id, out, revision)
    console.print(f"{card.num_virtual_tokens} virtual tokens for {card.base.name}, written to {out}", markup=False)
    result = {"prompt": str(out), "repository": repo_id, "base": card.base.name, "num_virtual_tokens": card.num_virtual_tokens}
    write_json(json_file, result)
