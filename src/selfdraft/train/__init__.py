"""Training: what draft adapters learn from. Needs the extra `train`.

distill.py   answers of the model itself, many at a time
prompts.py   what it answers, from files, data sets and the hub
shards.py    its answers on disk: written as they finish, read by trainers
"""
