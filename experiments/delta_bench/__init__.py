"""Parts of `experiments.bench_sparse_delta`: pairs of weights, peers, limits, measurements."""
