"""Fused training kernels. Each has a slow twin: `quant/`, `losses/logits.py` or `kernels/twins.py`."""
