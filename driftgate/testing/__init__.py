"""Real things for tests and the demo: tiny checkpoints, a vLLM process, an agent."""
