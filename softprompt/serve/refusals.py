"""What a request is refused with: OpenAI's shape of an error, whatever went wrong."""

from collections.abc import Mapping

from fastapi.responses import JSONResponse
from openai.types import ErrorObject

from softprompt.errors import ConfigError, DataError, Error, MissingPackage
from softprompt.serve.asking import Busy, NotServed

KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
NOWHERE = 499  # of a client that is gone; nginx logs this number too


class Refused(Error):
    """A request that is answered with an error. `param`: the field that it is about; `code`: what programs ask for."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    @property
    def kind(self) -> str:
        """OpenAI's `type`."""
        return KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")


class Gone(Refused):
    """The client has gone; nobody reads the answer."""

    def __init__(self) -> None:
        super().__init__("the client has gone", status=NOWHERE, code="client_gone")


OURS = Refused("this server made a mistake; its log says more", status=500, code="internal")


def refusal(error: Error) -> Refused:
    """What a client is told of an engine's error."""
    match error:
        case Refused():
            return error
        case NotServed():
            return Refused(str(error), status=404, param="model", code="model_not_found")
        case Busy():
            return Refused(str(error), status=429, code="busy", headers={"Retry-After": str(error.seconds)})
        case DataError():
            return Refused(error.reason, code="invalid_text")
        case ConfigError():  # whose messages begin with what they are about
            return Refused(str(error), param=str(error).split()[0].rstrip(":,"), code="invalid_value")
        case MissingPackage():
            return Refused(str(error), status=501, code="not_installed")
        case _:  # the message may name places on this machine; the log has it
            return Refused("the prompt cannot answer just now; the server's log says why", status=503, param="model", code="unavailable")


def as_body(refused: Refused) -> dict[str, object]:
    error = ErrorObject(message=str(refused), type=refused.kind, param=refused.param, code=refused.code)
    return {"error": error.model_dump(exclude_unset=True)}


def as_response(refused: Refused) -> JSONResponse:
    return JSONResponse(as_body(refused), refused.status, refused.headers)
