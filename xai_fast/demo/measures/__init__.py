"""Page of the measures that judge explanations."""
