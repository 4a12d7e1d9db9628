"""Which weights every token came from, where an update comes in the middle of a completion.

Updates keep requests in flight: what was generated stays, and what follows comes from the newer
weights. A span is (version of the weights, number of tokens).
"""

from __future__ import annotations

from collections.abc import Iterable

Span = tuple[int, int]


class Spans:
    """The spans of an engine's requests in flight.

    Attributes:
        version: Of the weights that the engine generates with from now on.
    """

    def __init__(self) -> None:
        self.version = 0
        self._open: dict[str, list[Span]] = {}

    def begin(self, request_id: str) -> None:
        """A request is in flight."""
        self._open[request_id] = [(self.version, 0)]

    def made(self, request_id: str, tokens: int) -> None:
        """So many more tokens have come; of requests that never began nothing is kept."""
        if (spans := self._open.get(request_id)) is not None:
            version, before = spans[-1]
            spans[-1] = (version, before + tokens)

    def update(self, version: int) -> None:
        """What comes from now on comes from these weights."""
        self.version = version
        for spans in self._open.values():
            if not spans[-1][1]:
                spans.pop()
            if not spans or spans[-1][0] != version:
                spans.append((version, 0))

    def end(self, request_id: str, tokens: int) -> tuple[Span, ...]:
        """The spans of a request that is over, and of which so many tokens were kept.

        Tokens that came before the request was known to be in flight are of its first span; what
        was cut off at its end (behind a stop text) is of its last.
        """
        spans = self._open.pop(request_id)
        extra = tokens - sum(count for _, count in spans)
        if extra > 0:
            spans[0] = (spans[0][0], spans[0][1] + extra)
        kept, left = [], tokens
        for version, count in spans:
            if left and count:
                kept.append((version, min(count, left)))
                left -= kept[-1][1]
        return tuple(kept)

    def forget(self, request_id: str) -> None:
        """A request is over, and nobody wants its spans; one that ended already may be named."""
        self._open.pop(request_id, None)


def joined(parts: Iterable[tuple[Span, ...]]) -> tuple[Span, ...]:
    """The spans of tokens that follow one another.

    >>> joined([((3, 5),), ((3, 2), (4, 1))])
    ((3, 7), (4, 1))
    """
    found: list[Span] = []
    for version, count in (span for part in parts for span in part):
        if found and found[-1][0] == version:
            count += found.pop()[1]
        found.append((version, count))
    return tuple(found)


def ends_of(spans: tuple[Span, ...], otherwise: int) -> tuple[int, int]:
    """The versions of the first token and of the last; `otherwise` where there is no token."""
    return (spans[0][0], spans[-1][0]) if spans else (otherwise, otherwise)
