"""The benchmark: methods and baselines side by side on the same prompts and the same machine.

suite.py     which prompts: a TOML file per set, or the user's own JSON lines
source.py    their rows, from a folder or from where they are published
arm.py       what answers them: methods of this package, and Hugging Face's `generate`
peer.py      other inference engines, each in its own process (peers/); stored.py: the GGUF file of a model
measure.py   the run: interleaved, warm, repeated; job.py: from options to a run
journal.py   finished answers, written as they come, so that a run can be continued
metrics.py   figures of a set of answers; interval.py: medians with intervals
bound.py     the limits of the machine: bandwidth, and the cost of rows
report.py    everything as one record and as tables; page.py, charts.py, sample.py: as a page
compare.py   two reports against each other
"""
