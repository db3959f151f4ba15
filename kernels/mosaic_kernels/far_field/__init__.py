"""What stands for the tokens that a step does not read: every page as one token with its mean value."""
