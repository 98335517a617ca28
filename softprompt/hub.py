"""Whether the model hub answers, asked once and quickly, so that being offline is one sentence and not minutes of retries.

The hub libraries read HF_ENDPOINT (a mirror) when they are imported; softprompt imports them only when it needs them.
"""

import socket
import urllib.request
from functools import cache
from urllib.parse import urlsplit

TIMEOUT_SECONDS = 5.0


def endpoint() -> str:
    """The hub's address: HF_ENDPOINT, or the libraries' default. Where it does not answer, the libraries are told to
    work offline, which leaves them their caches and spares their retries."""
    import huggingface_hub.constants

    address = huggingface_hub.constants.ENDPOINT
    if not _answers(address):
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    return address


@cache
def _answers(address: str) -> bool:
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
