"""The newest torch and transformers that all tests have passed with; what is newer gets a try, and one line that says so."""

import logging
from functools import lru_cache
from importlib.metadata import version

from packaging.version import Version

NEWEST = {"torch": "2.14.1", "transformers": "5.24.0"}


@lru_cache
def warn_of_newer() -> None:
    """Says once in a process which of them is newer than what was tried, patches left out of account."""
    newer = {name: version(name) for name, tried in NEWEST.items() if Version(version(name)).release[:2] > Version(tried).release[:2]}
    if newer:
        here = " and ".join(f"{name} {found}" for name, found in newer.items())
        tried = " and ".join(f"{name} {NEWEST[name]}" for name in newer)
        logging.getLogger(__name__).warning("%s: newer than what softprompt was tested with (up to %s); going on", here, tried)
