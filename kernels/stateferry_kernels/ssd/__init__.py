"""The chunk scan: prefill's form of the state space model."""
