"""Records what a rollout engine sampled, scores it with the trainer, and says where they differ."""
