"""mini-swe-agent with its default settings: LiteLLM's model, and commands in a shell."""

from __future__ import annotations


def run() -> str:
    from minisweagent.agents.default import DefaultAgent
    from minisweagent.config import get_config_from_spec
    from minisweagent.environments.local import LocalEnvironment
    from minisweagent.models import get_model

    config = get_config_from_spec("mini.yaml")
    agent = DefaultAgent(
        get_model("openai/policy", config["model"]),
        LocalEnvironment(**config["environment"]),
        **config["agent"],
    )
    return str(agent.run("Which weather is it in Tokyo?")["submission"]).strip()
