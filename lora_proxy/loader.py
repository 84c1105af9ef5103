"""How a module gets onto one vLLM server, and off it: adopt, inspect, load, warm up.

One try at a time, carried out from start to end; whether there is to be a try, and what
follows from it, is the member's. Knows nothing of requests.
"""

import logging

import orjson

from lora_proxy import sources, vllm
from lora_proxy.background import Files
from lora_proxy.errors import ProxyError
from lora_proxy.settings import UpstreamSettings
from lora_proxy.types import Headers, Module
from lora_proxy.upstream import Pool

log = logging.getLogger(__name__)

WARM_UP_ANSWER = 1 << 20  # bytes; more is nobody's answer of one token


class Loader:
    """Loads and unloads modules on one server.

    Args:
        pool: The way to it.
        control: Its control API.
        files: Reads adapters' files.
        settings: What the operator says of it.
        warm_up: After a load, one request of one token.
    """

    def __init__(
        self,
        pool: Pool,
        control: vllm.ControlClient,
        files: Files,
        settings: UpstreamSettings,
        *,
        warm_up: bool,
    ) -> None:
        self.settings = settings
        self._pool = pool
        self._control = control
        self._files = files
        self._warm_up = warm_up
        # The operator's names (--lora-modules), and the content that they were adopted for:
        # after the files changed, such a name still has the old weights.
        self._adopted: dict[str, str] = {}

    @property
    def authorization(self) -> bytes | None:
        """The field that the server wants of every request, if any."""
        key = self.settings.api_key
        return None if key is None else b"Bearer " + key.get_secret_value().encode()

    def restarted(self) -> None:
        """The server may have restarted, and read the operator's modules anew."""
        self._adopted.clear()

    async def load(self, module: Module) -> tuple[str, str]:
        """Adopts the adapter if it is there, else inspects its files and loads them.

        Returns:
            The name under which it is served, and the result for the metric.

        Raises:
            ProxyError: Why not; `vllm.permanent` says whether another try could help.
        """
        name = vllm.adopted(await self._control.models(), module)
        if name is not None and (
            name == module.served or self._adopted.setdefault(name, module.served) == module.served
        ):
            return name, "adopted"
        await self._judge(module)
        name = await self._control.load(module)
        if await self._changed(module):
            # Nobody knows which content the server has read.
            await self._control.unload(name)
            raise _changed_error(module)
        if self._warm_up:
            await self._warm(name)
        return name, "ok"

    async def unload(self, name: str) -> None:
        """Unloads what is served under this name.

        Raises:
            ProxyError: It may still be there.
        """
        await self._control.unload(name)

    async def _judge(self, module: Module) -> None:
        """Refuses what vLLM would, and what is no longer what the served name stands for."""
        if await self._changed(module):
            raise _changed_error(module)
        rank = self.settings.max_lora_rank
        try:
            await self._files.call(sources.inspect, module.path, rank)
        except ProxyError as error:
            raise ProxyError(error.code, f"adapter '{module.adapter}': {error.message}") from None

    async def _changed(self, module: Module) -> bool:
        if module.fingerprint is None:
            return False
        state = await self._files.call(sources.fingerprint, module.path)
        return state != module.fingerprint

    async def _warm(self, name: str) -> None:
        """One token, so that not the first client pays for kernels and caches."""
        body = orjson.dumps({"model": name, "prompt": "a", "max_tokens": 1})
        headers: Headers = [
            (b"host", self._pool.authority),
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
        ]
        if self.authorization is not None:
            headers.append((b"authorization", self.authorization))
        try:
            response = await self._pool.request(b"POST", b"/v1/completions", headers, body)
            try:
                await response.read_all(WARM_UP_ANSWER)
            finally:
                response.close()
        except ProxyError as error:  # the adapter is there all the same
            log.warning("%s: %s was not warmed up: %s", self._pool.name, name, error.message)


def _changed_error(module: Module) -> ProxyError:
    return ProxyError(
        "adapter_changed",
        f"the files of adapter '{module.adapter}' changed while it was being loaded; try again",
    )
