"""Floor 4: the only place that imports sglang. Registers backends, installs hooks, translates SGLang's events."""
