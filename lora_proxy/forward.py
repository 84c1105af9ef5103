"""Getting one request answered by one model: route, lease, forward, and try again.

Owns what happens between the choice of a model and the first byte of an answer: which
upstream is asked, what counts as its fault, and when the next one is. Knows nothing of
public names and clients' rights; the answer's way back is `relay`'s.
"""

import logging
from dataclasses import dataclass

from aiohttp import web

from lora_proxy import rewrite, vllm
from lora_proxy.access import Endpoint
from lora_proxy.background import Tasks
from lora_proxy.call import Call
from lora_proxy.errors import ProxyError
from lora_proxy.fleet import Choice, Fleet, Model, nothing_usable
from lora_proxy.member import Lease
from lora_proxy.metrics import Metrics
from lora_proxy.relay import error_body, header, relay
from lora_proxy.retries import Budget, retry_after
from lora_proxy.types import Adapter
from lora_proxy.upstream import Response

log = logging.getLogger(__name__)

BUSY = frozenset({429, 503})  # the upstream asks for patience; another holder may have room
SICK = frozenset({502, 503, 504})  # not the request's fault, as a 500 may be
STARTED = frozenset({"upstream_closed", "upstream_timeout"})  # it may have begun to generate
ROUNDS = 3  # with one upstream: as it is, after a loss, after a change of the files


@dataclass(frozen=True, slots=True)
class Retry:
    """What is sent again.

    Attributes:
        attempts: Upstreams tried for one request at most.
        budget: How much of it, as a share of traffic.
        replay_started: Also what may have begun to generate.
    """

    attempts: int
    budget: Budget
    replay_started: bool


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, however often and of whomever.

    Attributes:
        endpoint: Where it leads.
        peeked: What its body says; None where it is not JSON.
        body: As the client sent it.
        public: What the answer is to call the model.
        prefix: The beginning of the conversation, for prefix-affinity.
    """

    endpoint: Endpoint
    peeked: rewrite.Peek | None
    body: bytes
    public: str
    prefix: bytes = b""


class Forwarder:
    """Asks the fleet.

    Args:
        fleet: Whom to ask.
        metrics: Shared with the fleet.
        retry: What is sent again.
        tasks: Owns mirrored requests.
        mirror_limit: Mirrored requests at once.
    """

    def __init__(
        self,
        fleet: Fleet,
        metrics: Metrics,
        retry: Retry,
        *,
        tasks: Tasks,
        mirror_limit: int,
    ) -> None:
        self._fleet = fleet
        self._metrics = metrics
        self._retry = retry
        self._tasks = tasks
        self._mirror_limit = mirror_limit
        self._mirrors = 0

    async def answer(
        self, call: Call, question: Question, model: Model | None
    ) -> web.StreamResponse:
        """Has one model answer, by whichever upstream can.

        Raises:
            ProxyError: Nobody could, and nothing has been sent to the client.
        """
        choices = await self._fleet.route(model, question.prefix)
        self._retry.budget.deposit()
        for attempt in range(1, self._retry.attempts + 1):
            try:
                choice = await self._fleet.enter(call.adapter, choices)
            except ProxyError as error:
                if error.code != "no_upstream":
                    raise
                # All that it waited for have left the fleet; others may have come.
                choices = await self._fleet.route(model, question.prefix)
                choice = await self._fleet.enter(call.adapter, choices)
            choices = [other for other in choices if other is not choice]
            last = attempt == self._retry.attempts or not choices
            try:
                return await self._asked(call, question, choice, last=last)
            except ProxyError as error:
                if last and choice.hope and error.code == "upstream_connect":
                    raise nothing_usable() from error
                if last or not self._again(error):
                    raise
                self._metrics.retries(choice.member.name, error.code).inc()
                log.info("request %s: %s; trying the next upstream", call.id, error.message)
            finally:
                self._fleet.leave(choice)
        raise AssertionError("the last attempt returns or raises")

    def _again(self, error: ProxyError) -> bool:
        """Whether the next upstream is to be tried, which the budget is charged with."""
        if error.code == "upstream_busy":
            return True  # charged when its answer was left for another's
        replayable = error.replayable or (self._retry.replay_started and error.code in STARTED)
        return replayable and self._retry.budget.spend()

    # --- one upstream ----------------------------------------------------------------------

    async def _asked(
        self, call: Call, question: Question, choice: Choice, *, last: bool
    ) -> web.StreamResponse:
        """One upstream; again if it turns out to have forgotten the adapter."""
        ranked = choice.ranked
        call.upstream = choice.member.name
        self._metrics.decisions(ranked.tier.label).inc()
        if log.isEnabledFor(logging.DEBUG):
            spilled = ", spilled" if ranked.spilled else ""
            log.debug("request %s: %s (%s%s)", call.id, ranked.name, ranked.tier.label, spilled)
        healed = False
        for left in range(ROUNDS - 1, -1, -1):
            try:
                lease = await self._fleet.lease(choice)
            except ProxyError as error:
                if error.code == "upstream_connect":
                    choice.member.failed(error)
                if not left or error.code != "adapter_changed":
                    raise
                if isinstance(choice.model, Adapter):  # only they have files
                    await self._fleet.refresh(choice.model)
                continue
            try:
                heal = not healed and left > 0
                answer = await self._held(call, question, lease, choice, heal=heal, last=last)
            finally:
                lease.release()
            if answer is not None:
                return answer
            healed = True
        raise AssertionError("the last round returns or raises")

    async def _held(  # noqa: PLR0913  # one request's whole situation
        self,
        call: Call,
        question: Question,
        lease: Lease,
        choice: Choice,
        *,
        heal: bool,
        last: bool,
    ) -> web.StreamResponse | None:
        """Sends and relays; None if the adapter is to be loaded again first."""
        response = await self._sent(call, question, lease, choice)
        try:
            self._judge(lease, response, last=last)
            try:
                error = await error_body(response) if choice.model is not None else None
                if error is not None and heal and self._forgot(lease, response, error):
                    return None
                served = lease.model if choice.model is not None else ""
                answer = await relay(call, response, served, question.public, error)
            except ProxyError as broken:
                lease.faulted(broken)
                raise
            if call.broken is not None:
                lease.faulted(call.broken)
            return answer
        finally:
            response.close()

    async def _sent(self, call: Call, question: Question, lease: Lease, choice: Choice) -> Response:
        request, endpoint, member = call.request, question.endpoint, lease.member
        body = _written(lease, choice.model, question)
        headers = rewrite.upstream_headers(
            list(request.raw_headers),
            host=member.pool.authority,
            request_id=call.id.encode(),
            authorization=member.authorization,
            length=len(body) if body or request.method == "POST" else None,
        )
        target = f"{endpoint.path}?{call.query}" if call.query else endpoint.path
        try:
            return await member.pool.request(
                request.method.encode(), target.encode(), headers, body
            )
        except ProxyError as error:
            lease.faulted(error)
            raise

    def _judge(self, lease: Lease, response: Response, *, last: bool) -> None:
        """What the head says of the upstream; a busy one is left for another, if there is one.

        Raises:
            ProxyError: `upstream_busy`, replayable.
        """
        status = response.status
        wait = retry_after(
            header(response.headers, b"retry-after"), header(response.headers, b"date")
        )
        busy = ProxyError(
            "upstream_busy",
            f"upstream {lease.member.name} answered {status}; try again",
            retry_after=wait,
        )
        if status in BUSY and wait is not None:
            lease.member.hold(wait)
            lease.answered()
        elif status in SICK:
            lease.faulted(busy)
        else:
            lease.answered()
        # Without a budget for the next one, this one's own answer is the best there is.
        if not last and (status in BUSY or status == 502) and self._retry.budget.spend():
            raise busy

    def _forgot(self, lease: Lease, response: Response, error: bytes) -> bool:
        """The upstream does not know an adapter that we hold for resident."""
        if not vllm.is_unknown_model(response.status, error, lease.model) or not lease.lost():
            return False
        self._metrics.retries(lease.member.name, "adapter_lost").inc()
        return True

    # --- mirror ------------------------------------------------------------------------------

    def mirror(self, call: Call, question: Question, model: Model) -> None:
        """Has another model answer the same, for nobody to see."""
        if self._mirrors >= self._mirror_limit:
            self._metrics.mirrored(model.name, "dropped").inc()
            return
        self._mirrors += 1
        self._tasks.spawn(self._mirrored(call, question, model))

    async def _mirrored(self, call: Call, question: Question, model: Model) -> None:
        result = "failed"
        try:
            choices = await self._fleet.route(model, question.prefix)
            choice = await self._fleet.enter(model.name, choices)
            try:
                lease = await self._fleet.lease(choice)
                try:
                    await self._read_out(call, question, lease, choice)
                    result = "sent"
                finally:
                    lease.release()
            finally:
                self._fleet.leave(choice)
        except ProxyError as error:
            log.info("request %s was not mirrored to %s: %s", call.id, model.name, error.message)
        finally:
            self._mirrors -= 1
            self._metrics.mirrored(model.name, result).inc()

    async def _read_out(self, call: Call, question: Question, lease: Lease, choice: Choice) -> None:
        response = await self._sent(call, question, lease, choice)
        lease.answered()
        try:
            while await response.read():
                pass
        finally:
            response.close()


def _written(lease: Lease, model: Model | None, question: Question) -> bytes:
    """The body for the upstream: the served name, and the adapter's fields."""
    peeked, body = question.peeked, question.body
    if peeked is None:
        return body
    if model is None:
        return rewrite.unnamed(peeked, body)
    if isinstance(model, Adapter):
        return rewrite.write(peeked, body, lease.model, model.defaults, model.overrides)
    return rewrite.write(peeked, body, lease.model)
