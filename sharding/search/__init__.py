"""All strategies of a program on a cluster, and the best of them with a proof."""
