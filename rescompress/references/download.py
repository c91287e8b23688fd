"""Find out quickly whether pretrained weights can be had, instead of letting libraries try for minutes.

Without a network, timm's download retries for 46 seconds before it gives up; asking for one connection first takes
milliseconds, or a few seconds where packets vanish.
"""

import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TIMEOUT_S = 3.0


def reachable(url: str, timeout_s: float = TIMEOUT_S) -> bool:
    """Whether the host of `url`, or the proxy that leads to it, accepts a connection within `timeout_s`."""
    host, port = _first_hop(url)
    answers: list[bool] = []

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=timeout_s).close()
        except OSError:
            return
        answers.append(True)

    # In a thread: a name server that does not answer blocks for longer than any timeout of a socket.
    attempt = threading.Thread(target=connect, daemon=True)
    attempt.start()
    attempt.join(timeout_s)
    return bool(answers)


def in_torch_cache(url: str) -> bool:
    """Whether torch.hub has downloaded this file before."""
    import torch

    return (Path(torch.hub.get_dir()) / "checkpoints" / Path(urllib.parse.urlparse(url).path).name).is_file()


@contextmanager
def hub_cache_only() -> Iterator[None]:
    """Make huggingface_hub take files from its cache and fail at once for others."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def hub_or_cache(folder_or_id: str) -> Iterator[str]:
    """Make huggingface_hub take files from its cache where the hub cannot be reached; gives the obstacle, or ""."""
    if Path(folder_or_id).is_dir() or reachable(hub_url()):
        yield ""
        return
    with hub_cache_only():
        yield f"{host_of(hub_url())} cannot be reached"


def hub_url() -> str:
    """Return the address of the model hub, which the environment may redirect."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def host_of(url: str) -> str:
    """Return the host name in `url`."""
    return urllib.parse.urlparse(url).hostname or url


def _first_hop(url: str) -> tuple[str, int]:
    parts = urllib.parse.urlparse(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.hostname or ""):
        parts = urllib.parse.urlparse(proxy if "//" in proxy else f"http://{proxy}")
    return parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)
