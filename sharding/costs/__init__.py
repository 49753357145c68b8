"""Step time and bytes of strategies, term by term, under fitted constants."""
