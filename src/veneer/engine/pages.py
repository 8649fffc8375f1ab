"""The pages of the KV cache: who uses which, and which full pages can be reused as a cached prefix.

Counts only; the keys and values themselves lie in the runner's tensors. A page is in one of three states:

    free    nobody uses it and its content is worthless
    used    by one or more sequences (reference count); its content may also be cached
    idle    nobody uses it, but its content is cached; taken when no page is free, least recently used first

A full page is cached under a key chained over everything before it: blake2b(parent key, token ids). Into the
parent of each page in which the adapter begins or ends to act go its key and the places in the page where it
does: another prompt can have the same tokens there and be invoked, or end, elsewhere. Keys and values depend on
nothing else, so names never matter, no adapter sees another's pages, and those before it acts are the base's. What
a merged copy of an adapter computes is rounded in another way, so it has pages of its own. Pages of virtual tokens,
which all sequences of an adapter begin with, are always cached, those of other tokens only with prefix caching.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from hashlib import blake2b

from veneer.adapters.recipes import digests_of
from veneer.engine.sequence import Sequence


class PagePool:
    """`num_pages` pages of `page_size` tokens. Ask (`can_allocate`), then do (`allocate`)."""

    def __init__(self, num_pages: int, page_size: int, prefix_caching: bool = True) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.prefix_caching = prefix_caching
        self.query_tokens = 0  # prompt tokens looked up in the prefix cache
        self.hit_tokens = 0  # of these, found
        self._free = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._page_of: dict[bytes, int] = {}  # key -> page
        self._cached: dict[int, tuple[bytes, str | None]] = {}  # page -> (key, adapter)

    @property
    def available(self) -> int:
        """Pages that can be taken now."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        return self.num_pages - self.available

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def can_allocate(self, sequence: Sequence, length: int | None = None) -> bool:
        """Whether `allocate` would succeed."""
        length = len(sequence.tokens) if length is None else length
        cached = self.lookup(sequence) if not sequence.pages else []
        idle = sum(page in self._idle for page in cached)  # reusing these makes them unavailable
        missing = self.pages_for(length) - len(sequence.pages) - len(cached)
        return missing <= self.available - idle

    def allocate(self, sequence: Sequence, length: int | None = None) -> None:
        """Extend the block table over `length` tokens (unless told: all that are known).

        The first time, it begins with the cached prefix.
        """
        length = len(sequence.tokens) if length is None else length
        if not sequence.pages:
            self._reuse_prefix(sequence)
        for _ in range(self.pages_for(length) - len(sequence.pages)):
            sequence.pages.append(self._take())

    def free(self, sequence: Sequence) -> None:
        """Give up all pages. Cached ones stay cached until they are needed."""
        for page in reversed(sequence.pages):  # a prefix is useless without its head: the tail goes first
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._cached:
                    self._idle[page] = None
                else:
                    self._free.append(page)
        sequence.pages = []
        sequence.num_computed = 0

    def lookup(self, sequence: Sequence) -> list[int]:
        """The pages of the longest cached prefix that leaves at least one token to compute, and all unread ones.

        Pages have no hidden states.
        """
        pages: list[int] = []
        unread = sequence.unread
        most = unread.start if unread else len(sequence.tokens) - 1
        for index in range(self._cacheable(sequence, most)):
            page = self._page_of.get(self._key(sequence, index))
            if page is None:
                break
            pages.append(page)
        return pages

    def register(self, sequence: Sequence, start: int) -> None:
        """Cache the pages that became full since `start` tokens were computed.

        When another sequence has filled an identical page first, that one stays the cached one.
        """
        for index in range(start // self.page_size, self._cacheable(sequence, sequence.num_computed)):
            key, page = self._key(sequence, index), sequence.pages[index]
            if key not in self._page_of:
                self._page_of[key] = page
                stop = (index + 1) * self.page_size
                acts = any(change.start < stop for change in sequence.changes[:1])
                self._cached[page] = key, sequence.adapter if acts else None

    def forget(self, digest: str) -> None:
        """Drop everything cached for a deleted adapter and its blends. Sequences that use such pages keep them."""
        for page, (_, owner) in list(self._cached.items()):
            if owner is None or digest not in digests_of(owner):
                continue
            self._uncache(page)
            if page in self._idle:
                del self._idle[page]
                self._free.append(page)

    def _cacheable(self, sequence: Sequence, computed: int) -> int:
        """How many pages that are full when `computed` tokens are computed may be cached."""
        if not self.prefix_caching:
            computed = min(computed, sequence.num_virtual or 0)
        return computed // self.page_size

    def _reuse_prefix(self, sequence: Sequence) -> None:
        sequence.pages = self.lookup(sequence)
        for page in sequence.pages:
            self._references[page] += 1
            self._idle.pop(page, None)
        sequence.num_computed = len(sequence.pages) * self.page_size
        if sequence.preemptions == 0:  # a resumed sequence finds its own pages, which is no merit
            virtual = sequence.num_virtual or 0
            sequence.num_cached = max(sequence.num_computed - virtual, 0)
            if self.prefix_caching and not sequence.unread:
                self.query_tokens += len(sequence.tokens) - virtual
                self.hit_tokens += sequence.num_cached

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            self._uncache(page)
        self._references[page] = 1
        return page

    def _uncache(self, page: int) -> None:
        key, _ = self._cached.pop(page)
        del self._page_of[key]

    def _key(self, sequence: Sequence, index: int) -> bytes:
        """The key of the sequence's full page `index`. Kept on the sequence: its tokens never change."""
        keys = sequence.page_keys
        while len(keys) <= index:
            start = len(keys) * self.page_size
            parent = keys[-1] if keys else b""
            stop = start + self.page_size
            here = [(at - start, offset) for at, offset in sequence.changes if start <= at < stop]
            if sequence.adapter is not None and here:
                owner = f"{here} {sequence.adapter}" + (" merged" if sequence.merged else "")
                parent = blake2b(parent + owner.encode(), digest_size=32).digest()
            page = array("q", sequence.tokens[start : start + self.page_size])
            keys.append(blake2b(parent + page.tobytes(), digest_size=32).digest())
        return keys[index]
