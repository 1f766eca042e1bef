"""HTTP: FastAPI routes over the lifecycle and the engine's protocol.  No torch, no transformers."""
