"""Emulated links take the time that bandwidth and latency say."""

import pytest

from jaxrl import sync


@pytest.mark.parametrize(
    ("text", "bits", "latency"),
    [
        ("1gbit,20ms", 1e9, 0.02),
        ("400Gbit,5us", 4e11, 5e-6),
        ("2.5 mbps", 2.5e6, 0),
        ("100kbit/s, 1 s", 1e5, 1),
        ("8bit,0.5ms", 8, 5e-4),
    ],
)
def test_links_are_read(text, bits, latency):
    link = sync.Link.parse(text)
    assert link.bits_per_s == pytest.approx(bits)
    assert link.latency_s == pytest.approx(latency)


@pytest.mark.parametrize("text", ["", "fast", "1gb", "1gbit,20", "-1gbit", "0bit", "1.1.1gbit"])
def test_what_is_no_link_is_refused(text):
    with pytest.raises(ValueError, match=r"such as 1gbit,20ms.*got"):
        sync.Link.parse(text)


class Clock:
    """A clock that sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def paced(link: str, clock: Clock) -> sync.PacedStore:
    return sync.PacedStore(
        sync.MemoryStore(), sync.Link.parse(link), clock=lambda: clock.now, sleep=clock.sleep
    )


def test_a_request_takes_latency_and_transfer():
    clock = Clock()
    store = paced("8mbit,20ms", clock)
    store.put("a", bytes(1_000_000))  # 8 Mbit at 8 Mbit/s
    assert clock.now == pytest.approx(1.02)
    store.get("a")
    assert clock.now == pytest.approx(2.04)
    store.delete("a")
    assert clock.now == pytest.approx(2.06)
    assert sync.Link.parse("8mbit,20ms").seconds(1_000_000) == pytest.approx(1.02)


def test_requests_at_the_same_time_share_the_bandwidth_and_overlap_the_latency():
    clock = Clock()
    ends = []
    store = sync.PacedStore(
        sync.MemoryStore(),
        sync.Link.parse("8mbit,20ms"),
        clock=lambda: 0.0,  # both begin at once
        sleep=ends.append,
    )
    store.put("a", bytes(1_000_000))
    store.put("b", bytes(500_000))
    assert ends == pytest.approx([1.02, 1.52])
    assert clock.now == 0
