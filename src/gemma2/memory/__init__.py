"""How many bytes a Gemma 2 takes: to keep, to run and to train. Pure arithmetic on the config; nothing is measured.

Read in this order: `weights`, `running`, `training`. Letters in formulas: D width, I MLP width, H head size, N query
heads, K key/value heads, V vocabulary rows, B sequences, L tokens of each, C tokens of one prefill chunk, S keys that a
query meets, W window.

What is not covered: the interpreter and its libraries (about 0.4 GiB with PyTorch), the allocator's slack, and the
scratch of matrix-product libraries. So a figure here is a floor; leave a tenth more.
"""
