"""What does asynchrony buy, and what does it cost in learning?

Question: one task, one model, one number of samples: how fast do synchronous training (PPO, GRPO,
RLOO), one-step-off-policy training and trajectory balance with 1, 2 and 4 actors (TBA,
arXiv:2503.18929) get there, by the clock and by samples, and how many actors would pay elsewhere?

    python -m experiments.asynchrony                             # made arithmetic
    python -m experiments.asynchrony --seeds 3                   # mean ± standard error
    python -m experiments.asynchrony --data PATH                 # GSM8K's train.jsonl
    python -m experiments.asynchrony --link 10gbit,1ms
    python -m experiments.asynchrony --methods ppo,async_ppo,grpo,async_grpo,rloo,async_rloo

Hardware: two CPU cores for `quick` (the default, at most 8 minutes on a quiet machine; each further
seed adds the training times of its table), one accelerator for `base`. Output: the folder that is
printed, with report.html, asynchrony.png, summary.json, metrics.jsonl, TensorBoard events and
samples of every policy. Started again, it goes on with the first method that has not
finished; a method that was interrupted starts anew, since times of two processes do not add up.

On two cores actors and learner share the machine, so the speed-up of many actors is simulated: a
discrete-event model (`simulator`) with the durations that this run measures part by part. The
measured throughputs stand beside what the model says for this very machine. Durations come from
processor seconds, which do not change with what else the machine does, and the model gets the
processors that other processes left during the training (`machine`).

Expected: from greedy accuracy .57 (sampled .34) all methods reach .76 to .81 (.54 to .58) in 300
updates (one seed). TBA's learner never waits and neither do its actors, but two cores have no room
for both, and it learns a little less of each completion than the others do. Simulated updates a
second are 15 % off the measured ones in the median, and the more actors share two cores, the more
the model promises: 46 % too much with four. Publishing takes 1.4 to 2.3 % of the learner's time; a
learner that waited for it would spend 10 to 16 times that. Four times faster takes a generation
that is at least three times as long as an update.
"""
