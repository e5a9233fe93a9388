"""Soaks: what is promised of checkpoints, restarts and untrusted files, tried thousands of times.

    python -m experiments.soak damage      every kind of damage to a checkpoint is noticed
    python -m experiments.soak inputs      files of others are parsed, and nothing in them is executed
    python -m experiments.soak kills       kill -9 at 200 instants costs no more than an interval
    python -m experiments.soak long        10,000 steps, killed now and then: nothing lost, memory constant

Each ends with status 1 if a promise was broken. With `--write` its figures go to
`experiments/results/soak_*`.
"""
