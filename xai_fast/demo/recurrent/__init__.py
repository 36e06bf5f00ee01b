"""Page of attention in recurrent networks."""
