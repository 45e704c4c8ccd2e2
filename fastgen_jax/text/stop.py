"""Stop strings in a stream of text."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fastgen_jax.text.tokenizer import Tokenizer

_FIRST_MARK = 0xD800  # lone surrogates, which decoding UTF-8 never produces


@dataclass
class _Node:
    """A prefix of some stop string, in an Aho-Corasick automaton."""

    depth: int
    children: dict[str, _Node] = field(default_factory=dict)
    fallback: _Node | None = None  # the longest proper suffix that is a prefix too
    longest: str | None = None  # the longest stop string that ends here


class StopStrings:
    """Finds the first of several stop strings in text that arrives in pieces.

    The earliest match wins, and the longest of several that start there; the division into pieces has no effect. Only text
    that may begin a stop string is held back, which is why no library does this: they search complete texts. Characters of
    `unseen` count for matches but are never emitted: they represent tokens that are not part of the text. The match itself
    is emitted only if it is to be included.
    Source: Aho and Corasick, Efficient string matching (1975).
    """

    def __init__(self, stops: Sequence[str], *, unseen: Iterable[str] = (), includes_match: bool = False) -> None:
        if isinstance(stops, str):
            raise ValueError(f"stop strings must be a list, got the single string {stops!r}; pass [{stops!r}]")
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise ValueError(f"a stop string must be a non-empty str, got {stop!r}; remove it")
        self._unseen = {ord(character): None for character in unseen}
        self._includes_match = includes_match
        self._root = self._state = _automaton(stops)
        self._held = ""  # the end of the text so far, not yet emitted
        self._best: tuple[int, str] | None = None  # position in `_held` and string of the best match so far
        self.matched: str | None = None  # the stop string that ended the text

    def push(self, text: str, *, may_end: bool = True) -> tuple[str, str | None]:
        """Returns text that can be shown now, and the stop string once it is certain; then nothing more is emitted.

        Without `may_end`, stop strings that end in this text are ignored, but one may begin in it.
        """
        if self.matched is not None:
            return "", self.matched
        start = len(self._held)
        self._held += text
        for position, character in enumerate(text, start + 1):
            self._state = self._next(character)
            stop = self._state.longest
            if stop is not None and may_end:
                candidate = (position - len(stop), stop)
                # An earlier start wins; at the same start the later match is longer.
                if self._best is None or candidate[0] <= self._best[0]:
                    self._best = candidate
            if self._best is not None and not self._may_improve(position):
                return self._finish()
        pending = len(self._held) - self._state.depth
        keep = pending if self._best is None else min(pending, self._best[0])
        emitted, self._held = self._held[:keep], self._held[keep:]
        if self._best is not None:
            self._best = (self._best[0] - keep, self._best[1])
        return self._shown(emitted), None

    def flush(self) -> tuple[str, str | None]:
        """Returns at the end of the text what was held back, and the stop string if one was complete."""
        if self.matched is not None:
            return "", self.matched
        if self._best is not None:
            return self._finish()
        emitted, self._held = self._held, ""
        self._state = self._root
        return self._shown(emitted), None

    def _finish(self) -> tuple[str, str | None]:
        assert self._best is not None
        start, self.matched = self._best
        end = start + len(self.matched) if self._includes_match else start
        emitted, self._held = self._held[:end], ""
        return self._shown(emitted), self.matched

    def _shown(self, text: str) -> str:
        return text.translate(self._unseen) if self._unseen else text

    def _next(self, character: str) -> _Node:
        node: _Node | None = self._state
        while node is not None and character not in node.children:
            node = node.fallback
        return self._root if node is None else node.children[character]

    def _may_improve(self, position: int) -> bool:
        """Whether a partial match may become better than the best match: an earlier one, or a longer one."""
        assert self._best is not None
        return bool(self._state.children) and position - self._state.depth <= self._best[0]


def stops_with_tokens(stops: Sequence[str], tokenizer: Tokenizer) -> tuple[list[str], Mapping[int, str]]:
    """Extends `stops` to match special tokens that the text leaves out; returns all stop strings and token id -> mark.

    A mark is a single character that never occurs in text. It represents its token in the added stop strings, so that part
    of a special token's name does not match, and a name that the model spells out still does.
    """
    marks: dict[int, str] = {}
    added = []
    for stop in stops:
        marked = stop
        for token_id in tokenizer.encode(stop, add_special_tokens=False):
            name = tokenizer.token_bytes(token_id).decode(errors="replace")
            if token_id in tokenizer.special_ids and name and name in marked:
                mark = marks.setdefault(token_id, chr(_FIRST_MARK + len(marks)))
                marked = marked.replace(name, mark)
        if marked != stop:
            added.append(marked)
    return [*stops, *added], marks


def _automaton(stops: Sequence[str]) -> _Node:
    root = _Node(0)
    for stop in stops:
        node = root
        for character in stop:
            node = node.children.setdefault(character, _Node(node.depth + 1))
        node.longest = stop
    queue = deque((root, character, child) for character, child in root.children.items())
    while queue:  # breadth first: a fallback is shallower, so it is already complete
        parent, character, node = queue.popleft()
        fallback = parent.fallback
        while fallback is not None and character not in fallback.children:
            fallback = fallback.fallback
        node.fallback = root if fallback is None else fallback.children[character]
        node.longest = node.longest or node.fallback.longest
        queue.extend((node, letter, child) for letter, child in node.children.items())
    return root
