"""The command line: one short function per verb. Heavy modules are imported by the verb that needs them."""

import io
import os
import sys

from softprompt.cli import carrying, chat, data, distilling, importing, prompts, serving, sweeping, training  # noqa: F401 - each brings its verbs
from softprompt.cli.options import app, arrange
from softprompt.engine.launched import launched
from softprompt.errors import Error

GROUPS = {  # the verbs of --help, in the order of work
    "Look at data": ("init", "show"),
    "Train": ("demo", "plan", "train", "sweep", "distil", "doctor", "report"),
    "Judge": ("eval", "inspect", "prune", "lm-eval"),
    "Use": ("generate", "chat", "serve"),
    "Carry elsewhere": ("export", "attach", "push", "pull", "import", "recycle"),
}
arrange(GROUPS)


def main() -> None:
    """Entry point: errors of the user are one line and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for stream in (sys.stdout, sys.stderr):  # what a console cannot show is escaped, and ends nothing
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    rank = launched().rank
    if rank:  # of several processes the first one talks
        from softprompt.screen.console import beside, console

        console.quiet = beside.quiet = True
    try:
        app()
    except Error as error:
        if not error.said:
            print(f"{f'process {rank}: ' if rank else ''}error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
