"""What is run: named dimensions, tensors and operations; decoders by description."""
