"""instructor: an answer of a type, with a second attempt after one that does not fit.

run("tools" | "json")
"""

from __future__ import annotations

from typing import Any


def run(mode: str) -> str:
    import instructor
    from pydantic import BaseModel

    class Weather(BaseModel):
        city: str
        sky: str

    options: dict[str, Any] = {"tools": {}, "json": {"mode": instructor.Mode.JSON}}
    client = instructor.from_provider("openai/policy", **options[mode])
    weather = client.create(
        messages=[{"role": "user", "content": "Tokyo?"}], response_model=Weather, max_retries=2
    )
    return f"It is {weather.sky}."
