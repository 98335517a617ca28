"""Prompts managed over HTTP, by whoever has an admin key."""

import errno
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse
from openai.types import ModelDeleted

from softprompt.errors import ArtifactError, ConfigError
from softprompt.serve.asking import Model
from softprompt.serve.folder import Folder
from softprompt.serve.guard import read_body
from softprompt.serve.log import logger
from softprompt.serve.refusals import Refused
from softprompt.serve.service import Here, Service, needs_admin, takes_more

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
router = APIRouter(prefix="/v1/prompts", dependencies=[Depends(needs_admin)])


def _described(model: Model) -> dict[str, object]:
    return {"id": model.name, "object": "prompt", "created": model.created, "num_virtual_tokens": model.num_virtual, "card": model.card}


def _folder(service: Service) -> Folder:
    if service.folder is None:
        raise Refused("prompts have no place here: the server was started without --folder", status=403, code="no_folder")
    return service.folder


@router.get("", response_model=None)
async def listed(service: Here) -> Response:
    """Every prompt with its card."""
    found = [_described(model) for model in service.engine.models() if model.kind == "prompt"]
    return JSONResponse({"object": "list", "data": found})


@router.post("", dependencies=[Depends(takes_more)], response_model=None)
async def added(request: Request, service: Here, name: Annotated[str | None, Query()] = None) -> Response:
    """Takes a .tar.gz file with the files of a prompt's folder as the body."""
    if name is None:
        raise Refused("under which name? POST /v1/prompts?name=NAME", param="name", code="missing_required_parameter")
    folder = _folder(service)
    archive = await read_body(request, service.settings.most_upload, service.settings.seconds)
    try:
        model = await folder.put(name, archive, service.settings.most_upload)
    except ArtifactError as error:
        raise Refused(f"the prompt is refused: {str(error).replace(f'{folder.path}/', '')}", code="invalid_prompt") from None
    except OSError as error:
        logger.error("%s: %s", folder.path / name, error)
        status, message = (507, "no room is left for it") if error.errno in NO_ROOM else (500, "it could not be written")
        raise Refused(f"the prompt is not kept: {message}", status=status, code="not_kept") from None
    logger.info("%s was uploaded", name)
    return JSONResponse(_described(model), 201)


@router.delete("/{name}", response_model=None)
async def removed(name: str, service: Here) -> Response:
    """Answers that have begun are finished."""
    try:
        await _folder(service).drop(name)
    except ConfigError as error:
        raise Refused(str(error), status=409, param="name", code="needed") from None
    logger.info("%s was removed", name)
    return JSONResponse(ModelDeleted(id=name, deleted=True, object="prompt").model_dump())
