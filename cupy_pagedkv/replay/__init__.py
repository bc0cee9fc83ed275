"""``python -m cupy_pagedkv``: traces of requests, played through a cache like any user's. Stands on ``caches``."""
