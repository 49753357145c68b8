"""Parts of `experiments.bench_rl`: the workload, one worker per contestant, their rounds."""
