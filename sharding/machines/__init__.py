"""Clusters by name, from devices or a file; axes on tori; the machine that is here."""
