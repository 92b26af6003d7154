"""Serving one model to many clients over HTTP: the OpenAI API, continuous batching, a page in the browser.

`batcher` computes (in a thread of its own) and knows nothing of HTTP; `schemas`, `translation` and the
modules of endpoints know nothing of engines; `app` puts them together.
"""
