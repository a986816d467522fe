"""OpenAI's fine-tuning jobs: an uploaded file in, a model that is served out."""
