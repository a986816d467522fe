"""Models behind other people's APIs. `table` says which there are; each protocol is one file that translates between
its wire and OpenAI's chat completions, which is the form that the rest of LLMasOS speaks."""

from llmasos.client.providers.table import PROVIDERS, Endpoint, Provider, is_remote, parse, shown

__all__ = ["PROVIDERS", "Endpoint", "Provider", "is_remote", "parse", "shown"]
