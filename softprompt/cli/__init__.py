"""The command line: one short function per verb. Heavy modules are imported by the verb that needs them."""

import os
import sys

from softprompt.cli import training, data, prompts, importing, carrying  # noqa: F401  # isort: skip - the verbs, in the order of --help
from softprompt.cli.options import app
from softprompt.errors import Error


def main() -> None:
    """Entry point: errors of the user are one line and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except Error as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
