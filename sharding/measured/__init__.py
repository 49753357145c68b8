"""Tables of measured runs: read, predicted, fitted to; AMP's model and profiles."""
