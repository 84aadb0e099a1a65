"""Training of draft adapters and of models that draft for themselves. Needs the extra `train`.

Data       prompts.py, distill.py, trajectories.py, shards.py; windows.py for looped models
Adapters   run.py: sequences.py (batches), student.py (loss), trainer.py (loop), calibration.py, card.py
Tuning     tuning.py: packed.py (batches), tuned.py (loss), filler.py, tuning_cost.py
Looped     looped.py: exits.py (loss), optimizer.py, memory.py, looped_card.py
"""
