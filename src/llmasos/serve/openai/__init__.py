"""OpenAI's API: /v1/models, /v1/chat/completions, /v1/completions, /v1/embeddings; and what its neighbours added:
rerank (Jina's, Cohere's), score, tokenize and detokenize (vLLM's).

What a request asks for is done or refused by name. Not here: images and audio.
"""

from llmasos.serve.openai.models import describe
from llmasos.serve.openai.routes import create_router

__all__ = ["create_router", "describe"]
