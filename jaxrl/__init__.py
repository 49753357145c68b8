"""Safe reinforcement learning of language models in JAX.

    prompts ─► rollouts ─► rewards, costs ─► advantages ─► objective (+ constraint) ─► learner

`types` holds the records that pass from part to part; `data`, `tokenizers` give prompts;
`models`, `policy`, `rollouts` write and weigh completions; `rewards` scores them; `advantages`,
`constraints`, `objectives` are what `recipes` composes into algorithms; `learner` updates,
`train` is the loop, `checkpoint` keeps it, `evaluation` judges prompt by prompt. `actors` write and
score apart from the learner, with weights that `sync` carries to them and a `replay` between.
"""
