"""Page of concepts: TCAV on EfficientNet-Lite0."""
