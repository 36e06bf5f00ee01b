"""Page of artifacts of vision transformers, and registers."""
