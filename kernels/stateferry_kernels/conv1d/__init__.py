"""The depthwise causal convolution in front of the state space model, over raw columns."""
