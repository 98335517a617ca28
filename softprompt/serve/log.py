"""The log: one JSON object a line on standard error, a line for every request, and for what a server has to say beside them."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

from softprompt.serve.account import Account

logger = logging.getLogger("softprompt.serve")


class StandardError(logging.StreamHandler):  # type: ignore[type-arg]
    """Standard error as it is when something is logged."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr


class JsonLines(logging.Formatter):
    """A record as a line; `extra={"fields": {...}}` stands in it as it is."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"), "level": record.levelname.lower()}
        fields = getattr(record, "fields", None)
        line |= {"message": record.getMessage()} if fields is None else fields
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def log_as_json() -> None:
    """Sends all that this process logs to standard error, as such lines."""
    handler = StandardError()
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logger.setLevel(logging.INFO)


def log_request(account: Account) -> None:
    fields: dict[str, object] = {
        "request": account.id,
        "method": account.method,
        "route": account.route,
        "model": account.model,
        "status": account.status,
        "error": account.error,
        "answers": account.answers,
        "prompt_tokens": account.num_prompt,
        "virtual_tokens": account.num_virtual,
        "completion_tokens": account.num_said,
        "seconds": round(account.seconds, 4),
        "first_token": None if account.first_token is None else round(account.first_token, 4),
        "user": account.user,
    }
    if account.asked is not None:
        fields |= {"asked": account.asked, "said": account.said}
    logger.info("", extra={"fields": fields})
