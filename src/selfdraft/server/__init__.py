"""The OpenAI-compatible server: `selfdraft serve`. It needs the extra `serve` (FastAPI, uvicorn).

A request's way: `guard.py` (host, key, size of the body) -> `app.py` (routes) -> `requests.py` (what was
asked) -> `prompts.py` (token ids) -> `serving.py` (limits, parameters) -> `generation.py` (tickets of the
engine, merged into one stream of pieces) -> `chat.py`, `completions.py` or `responses.py` (the shape of the
answer).
"""
