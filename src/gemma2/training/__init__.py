"""Training: one loop, objectives that are functions, settings, checkpoints of a run.

Read in this order: `settings`, `loop`, `objectives`, `linear_cross_entropy`; then `pretrain`, `tune` and `distill`,
which put them together. What these three share is in `text_data`, `example_data`, `trained_model` and `run_stages`.
"""
