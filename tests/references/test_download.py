"""Whether a host can be reached, found out at once."""

import socket
import time

from rescompress.references import download


def answers_late(*_args, **_more):
    time.sleep(1)
    raise OSError("too late")


def test_reachable_is_what_answers_in_time(monkeypatch):
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/x"
        assert download.reachable(address)
    assert not download.reachable(address)
    monkeypatch.setattr("socket.create_connection", answers_late)
    started = time.perf_counter()
    assert not download.reachable(address, timeout_s=0.05)
    assert time.perf_counter() - started < 0.8


def test_the_way_to_a_host_leads_through_the_proxy(monkeypatch):
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy.test:3128"})
    monkeypatch.setattr("urllib.request.proxy_bypass", lambda host: host == "near.test")

    assert download._first_hop("https://far.test/a") == ("proxy.test", 3128)
    assert download._first_hop("https://near.test/a") == ("near.test", 443)
