"""Training: one loop, objectives that are functions, settings, checkpoints of a run.

Read in this order: `settings`, `loop`, `objectives`, `linear_cross_entropy`; then `pretrain`, which puts them together.
"""
