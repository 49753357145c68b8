collect_ignore = ["make_golden.py", "save_golden.py"]  # scripts; one of them needs PyTorch
