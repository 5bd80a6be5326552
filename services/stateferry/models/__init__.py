"""Models that read Hugging Face directories and run on the serving kernels."""
