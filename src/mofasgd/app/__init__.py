"""The training application and the baselines it compares with."""
