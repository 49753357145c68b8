"""Can a language model be helpful and safe on *every* prompt?

Question: from one SFT policy, what do RePO and PPO-Lagrangian reach, in reward and in the
safety of the worst prompts?

    python -m experiments.safety                                  # embedded world, minutes
    python -m experiments.safety --preset small --data PATH       # real text
    python -m experiments.safety --model FOLDER --data PATH       # a Hugging Face model
    python -m experiments.safety --help

Hardware: two CPU cores for `quick` (under 5 minutes) and `small` (under an hour); one GPU or
TPU host for `base`. Output: the folder that is printed, with report.html, summary.json,
metrics.jsonl, TensorBoard events and samples of every policy; of a Hugging Face model also
models/ALGORITHM, which is one as well. Started again, it resumes; told to stop by SIGTERM, it saves
and exits with status 75. `--mesh` divides it over devices, and docs/launch.md over machines.

Expected on the embedded world: PPO-Lagrangian keeps the *mean* cost below zero while a tenth of
the prompts stays unsafe; plain RePO is safer and leaves a stuck few; the recommended `repo_tb`
is safe on nearly all at about the reward of the best safe answers.
"""
