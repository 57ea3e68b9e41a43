"""What can go wrong between a client and a Hub, on purpose."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from aiohttp import web


@dataclass(frozen=True)
class Seen:
    """One request. `size` is that of its body, as announced; status 0: the connection was cut."""

    route: str
    method: str
    path: str
    size: int
    token: str | None
    status: int


@dataclass
class Fault:
    """status: answer so instead of doing it. drop: cut the connection after `after` bytes of the body.
    lose: do it, and cut the connection instead of telling. slow: seconds to wait first. first: what
    happens at the Hub just before."""

    status: int = 0
    message: str = "injected"
    code: str | None = None
    drop: bool = False
    after: int = 0
    lose: bool = False
    slow: float = 0.0
    first: Callable[[], object] | None = None
    times: int = 1

    def answer(self) -> web.Response:
        headers = {"X-Error-Message": self.message} | ({"X-Error-Code": self.code} if self.code else {})
        return web.json_response({"error": self.message}, status=self.status, headers=headers)


class Faults:
    """A middleware that logs each request, and injects the next fault of its route."""

    def __init__(self):
        self.log: list[Seen] = []
        self.waiting: dict[str, list[Fault]] = {}

    def next(self, route: str) -> Fault | None:
        queue = self.waiting.get(route, [])
        if not queue:
            return None
        queue[0].times -= 1
        return queue[0] if queue[0].times else queue.pop(0)

    async def _handle(self, request: web.Request, handler, fault: Fault | None) -> web.StreamResponse:
        if fault is None:
            return await handler(request)
        await asyncio.sleep(fault.slow)
        if fault.first is not None:
            fault.first()
        if fault.status:
            await request.read()
            return fault.answer()
        if fault.drop:
            received = 0
            while received < fault.after and (chunk := await request.content.readany()):
                received += len(chunk)
        else:
            response = await handler(request)
            if not fault.lose:
                return response
        request.transport.abort()
        return web.Response(status=500)

    def middleware(self):
        @web.middleware
        async def handle(request: web.Request, handler):
            route = request.match_info.handler.__name__
            fault = self.next(route)
            cut = fault is not None and (fault.drop or fault.lose)
            status = 500
            try:
                response = await self._handle(request, handler, fault)
                status = response.status
                return response
            except web.HTTPException as error:
                status = error.status
                raise
            finally:
                token = request.headers.get("Authorization", "").removeprefix("Bearer ") or None
                size = request.content_length or 0
                self.log.append(
                    Seen(route, request.method, request.path, size, token, 0 if cut else status)
                )

        return handle
