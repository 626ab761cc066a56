"""The HTTP server around the engine: OpenAI's completions API, text and token ids, monitoring."""
