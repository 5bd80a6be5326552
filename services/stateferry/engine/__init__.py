"""From scheduled rows to sampled tokens: batches, the model runner and the sampler."""
