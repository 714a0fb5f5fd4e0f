"""An agent of Harbor: it asks the model once, and writes the answer into /app/answer.txt."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from typing import Any

from harbor.agents.base import BaseAgent
from harbor.environments.base import BaseEnvironment


class Scribe(BaseAgent):
    @staticmethod
    def name() -> str:
        return "scribe"

    def version(self) -> str:
        return "1"

    async def setup(self, environment: BaseEnvironment) -> None:
        pass

    async def run(self, instruction: str, environment: BaseEnvironment, context: Any) -> None:
        answer = await asyncio.to_thread(self._ask, instruction)
        path = self.logs_dir / "answer.txt"
        path.write_text(answer)
        await environment.upload_file(path, "/app/answer.txt")

    def _ask(self, instruction: str) -> str:
        variables = self.extra_env
        request = urllib.request.Request(
            f"{variables['OPENAI_BASE_URL']}/chat/completions",
            data=json.dumps(
                {"model": "policy", "messages": [{"role": "user", "content": instruction}]}
            ).encode(),
            headers={
                "Authorization": f"Bearer {variables['OPENAI_API_KEY']}",
                "Content-Type": "application/json",
            },
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return str(json.load(response)["choices"][0]["message"]["content"] or "")
