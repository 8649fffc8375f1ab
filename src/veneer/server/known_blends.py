"""What the engine found out about blends: each is made once before its first request, so that it can be refused."""

from __future__ import annotations

import logging
from collections import OrderedDict

from veneer.adapters.recipes import is_blend
from veneer.adapters.saved_blends import Blend
from veneer.engine.client import EngineClient
from veneer.engine.messages import AdapterInfo

log = logging.getLogger(__name__)

LIMIT = 4096  # blends that are remembered


class KnownBlends:
    """By key, least recently used out first. A key says all that a blend is, so what is known of it stays true."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._known: OrderedDict[str, AdapterInfo] = OrderedDict()

    async def of(self, blend: Blend) -> AdapterInfo | None:
        """What is known of a blend; None for one that is an adapter as it is, or the base.

        Raises what the engine refuses it with. Its adapters must be held meanwhile.
        """
        key = blend.key
        if key is None or not is_blend(key):
            return None
        info = self._known.get(key)
        if info is None:
            info = await self._engine.check_blend(key)
            error = "" if info.error is None else f", cut with a relative error of {info.error:.3g}"
            log.info("blend %s: rank %d%s", blend.label, info.rank, error)
        self._known[key] = info
        self._known.move_to_end(key)
        while len(self._known) > LIMIT:
            self._known.popitem(last=False)
        return info
