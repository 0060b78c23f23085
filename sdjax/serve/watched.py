"""Watch HTTP requests from their start to the end of their answers."""

from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Watched:
    """Call `began` with each HTTP request's scope, and what it returns with the answer's status when that has ended.

    The status is 500 where the application fails before it answers.
    """

    def __init__(self, app: ASGIApp, began: Callable[[Scope], Callable[[int], None]]) -> None:
        self.app = app
        self.began = began

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        ended, status = self.began(scope), 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            ended(status)
