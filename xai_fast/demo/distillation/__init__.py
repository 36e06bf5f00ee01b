"""Page of distillation: black boxes as shape functions."""
