"""Plugin files for training frameworks. ms-swift puts this folder on sys.path, so it contains nothing else."""
