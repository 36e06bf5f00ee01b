"""Page of attention rollout."""
