"""What does asynchrony buy, and what does it cost in learning?

Question: one task, one model, one number of samples: how fast do synchronous training (PPO, GRPO,
RLOO), one-step-off-policy training and trajectory balance with 1, 2 and 4 actors (TBA,
arXiv:2503.18929) get there, by the clock and by samples, and how many actors would pay elsewhere?

    python -m experiments.asynchrony                             # made arithmetic, 10 minutes
    python -m experiments.asynchrony --data PATH                 # GSM8K's train.jsonl
    python -m experiments.asynchrony --link 10gbit,1ms

Hardware: two CPU cores for `quick` (the default, at most 10 minutes), one accelerator for `base`.
Output: the folder that is printed, with report.html, summary.json, metrics.jsonl, TensorBoard
events and samples of every policy. Started again, it goes on with the first method that has not
finished; a method that was interrupted starts anew, since times of two processes do not add up.

On two cores actors and learner share the machine, so the speed-up of many actors is simulated: a
discrete-event model (`simulator`) with the durations that this run measures part by part. The
measured throughputs stand beside what the model says for this very machine.

Expected: from greedy accuracy .57 (sampled .34) all methods reach .76 to .81 (.54 to .58) in 300
updates (one seed). TBA's learner never waits, but two cores have no room for its actors, and it
learns a little less of each completion than the others do. Simulated and measured throughput
differ by a fifth in the median, measured on a busy machine. Four times faster takes a generation
that is at least three times as long as an update; publications raise that to about four here.
"""
