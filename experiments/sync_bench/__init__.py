"""Parts of experiments.weight_sync: contestants, transports, cost model, tables and plots."""
