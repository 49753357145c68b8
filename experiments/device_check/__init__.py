"""Does everything that needs an accelerator work on the one that is here, and how fast?

    python -m experiments.device_check --out results/DEVICE.json
    python -m experiments.device_check --tiny                       # on a CPU, a minute or two

On whatever devices JAX finds, in under 8 minutes: the kernels of sparse deltas against their
reference, bit for bit; attention's kernels against plain XLA; one RL step of a model of about 1B
random weights, with tokens a second, the share of the peak that it reaches (MFU), and what the
planner had predicted; generation in tokens a second; and a short RePO run, whose cost has to fall.

Each check is a process of its own: one that fails, crashes or hangs does not stop the others. What
the budget has no room for is skipped, and says so. The result, written after every check, names
the device and all versions. Exit status 1 when a check failed.
"""
