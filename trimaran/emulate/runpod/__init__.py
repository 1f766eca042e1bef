"""A local ``api.runpod.ai/v2/ENDPOINT``, for real workers and real clients."""
