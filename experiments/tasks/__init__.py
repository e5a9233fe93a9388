"""Tasks: what is asked of a memory, each a config whose examples are a pure function of (config, seed).

Examples are made, not downloaded: bit for bit the same on any machine, training and test apart, the answer
recoverable from the input. A source's `chance` is the accuracy of the best guess that does not look.
"""
