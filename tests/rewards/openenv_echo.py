"""An OpenEnv environment for tests, as its documentation writes one; with a port, its server."""

from __future__ import annotations

import sys
import time
from typing import Any

from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State


class EchoAction(Action):
    message: str
    times: int = 1


class EchoObservation(Observation):
    echoed: str = ""
    length: int = 0


class EchoEnvironment(Environment[EchoAction, EchoObservation, State]):
    """Echoes; ends at `bye`, fails at `fail`, hangs at `hang`."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self, greeting: str = "Hello") -> None:
        super().__init__()
        self.greeting = greeting
        self.heard: list[str] = []

    def reset(
        self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any
    ) -> EchoObservation:
        self.heard = []
        name = kwargs.get("name", "nobody")
        return EchoObservation(echoed=f"{self.greeting} {name}, seed {seed}.")

    def step(
        self, action: EchoAction, timeout_s: float | None = None, **kwargs: Any
    ) -> EchoObservation:
        if action.message == "fail":
            raise RuntimeError("out of order")
        if action.message == "hang":
            time.sleep(3600)
        self.heard.append(action.message)
        echoed = " ".join([action.message] * action.times)
        done = action.message == "bye"
        reward = float(len(self.heard))
        return EchoObservation(
            echoed=echoed, length=len(echoed), done=done, reward=reward, metadata={"turn": reward}
        )

    @property
    def state(self) -> State:
        return State(step_count=len(self.heard))


if __name__ == "__main__":
    import uvicorn
    from openenv.core.env_server.http_server import create_fastapi_app

    app = create_fastapi_app(
        EchoEnvironment, EchoAction, EchoObservation, max_concurrent_envs=int(sys.argv[2])
    )
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
