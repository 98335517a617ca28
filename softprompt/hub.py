"""Whether the model hub answers, asked quickly, so that being offline is one sentence and not minutes of retries.

The hub libraries read HF_ENDPOINT (a mirror) when they are imported; softprompt imports them only when it needs them.
"""

import socket
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from urllib.parse import urlsplit

TIMEOUT_SECONDS = 5.0
ASKED_AGAIN_SECONDS = 30.0  # a long-lived process notices that the network is back


@contextmanager
def hub() -> Iterator[str]:
    """Yields the hub's address: HF_ENDPOINT, or the libraries' default. Where it does not answer, the libraries work offline inside,
    which leaves them their caches and spares their retries; afterwards they are as before."""
    import huggingface_hub.constants

    address = huggingface_hub.constants.ENDPOINT
    settings = [huggingface_hub.constants, *([sys.modules["datasets.config"]] if "datasets.config" in sys.modules else [])]
    before = [one.HF_HUB_OFFLINE for one in settings]
    answers = _answers(address, int(time.monotonic() / ASKED_AGAIN_SECONDS))
    for one, offline in zip(settings, before, strict=True):
        one.HF_HUB_OFFLINE = offline or not answers
    try:
        yield address
    finally:
        for one, offline in zip(settings, before, strict=True):
            one.HF_HUB_OFFLINE = offline


@lru_cache(maxsize=4)
def _answers(address: str, when: int) -> bool:
    """True when a connection opens. Behind a proxy, the proxy is asked instead."""
    target = urlsplit(address)
    proxy = urllib.request.getproxies().get(target.scheme)
    if proxy and not urllib.request.proxy_bypass(target.hostname or ""):
        target = urlsplit(proxy)
    port = target.port or (443 if target.scheme == "https" else 80)
    try:
        socket.create_connection((target.hostname or "", port), timeout=TIMEOUT_SECONDS).close()
    except OSError:
        return False
    return True
