"""What pytest must not import where PyTorch and transformers are not installed."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("torch") and find_spec("transformers") else ["cupy_pagedkv/transformers.py"]
