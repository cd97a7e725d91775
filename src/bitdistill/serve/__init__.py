"""A packed student behind HTTP: OpenAI's chat and completion routes, and classification with probabilities.

`bitdistill serve MODEL` starts it; see docs/serve.md. No torch is loaded.
"""
