"""The prefill worker: runs prompts, answers token 0, pushes the state to a decode worker."""
