"""Pallas kernels with their references and wire formats. Knows nothing of models or of RL.

Beside this package the Hugging Face Hub distribution `kernels` takes the same import name: install
one of the two in an environment.
"""
